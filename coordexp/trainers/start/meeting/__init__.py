"""The ranks of a run meet before anything is loaded: the same settings, the same files, one output folder."""
