"""The gallery of a page: cards with pictures, boxes and outlines, drawn by the page itself, one screenful at a time."""
