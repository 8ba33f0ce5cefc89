"""One linear story per training stage."""
