"""Signs of life of every rank, and what is left of a run that ended badly. No torch."""
