"""How the next token is chosen: sampling, penalties, the end of repeats, coordinates read from their distribution."""

from coordexp.rollout.decoding.readout import read_coords

__all__ = ["read_coords"]
