"""Numbers that may change over a run, as they are written."""
