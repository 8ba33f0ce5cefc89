"""`coordexp doctor`: what the files of a run say about it."""
