"""Text <-> objects: coordinate vocabulary, CoordJSON, rollout parsing and JSONL records. Torch-free."""

from __future__ import annotations

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.schema import BoxObject, DropReason

__all__ = ["BoxObject", "CoordVocab", "DropReason"]
