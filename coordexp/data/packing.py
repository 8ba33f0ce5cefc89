"""The stable name of the choice of segments; the code is `coordexp.packing.choice`."""

from coordexp.packing.choice import select_segments

__all__ = ["select_segments"]
