"""The samples of a dry run: the longest there are, since a step on them fits if any does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coordexp.data.chosen import ChosenSamples
from coordexp.data.raw_samples import RawSamples
from coordexp.swift_bridge.packing import packed_lengths
from coordexp.trainers.dry_run.parts import DataFacts


def longest(dataset: Any, number: int) -> tuple[ChosenSamples, DataFacts]:
    """The `number` longest samples (or packs) of a data set, longest first, and what is said of the whole of it."""
    lengths = np.asarray(_lengths(dataset))
    order = np.argsort(-lengths, kind="stable")[:number].tolist()
    facts = DataFacts(len(lengths), int(lengths.max(initial=0)), float(lengths.mean()) if len(lengths) else 0)
    return ChosenSamples(dataset, order, lengths.tolist()), facts


def _lengths(dataset: Any) -> Sequence[int]:
    packs = packed_lengths(dataset)
    if packs is not None:
        return packs
    found: Sequence[int] = dataset.lengths() if isinstance(dataset, RawSamples) else dataset["lengths"]
    return found
