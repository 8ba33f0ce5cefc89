"""A data set in pictures."""
