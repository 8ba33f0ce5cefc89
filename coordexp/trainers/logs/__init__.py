"""Where the records of a run go beside its own files."""
