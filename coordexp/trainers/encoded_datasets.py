"""Our encoded samples in place of ms-swift's, which replace in silence what they cannot encode."""

from __future__ import annotations

from typing import Any

from coordexp.data.lengths import check_lengths
from coordexp.data.samples import EncodedSamples
from coordexp.swift_bridge.packing import replace_packed
from coordexp.swift_bridge.prompts import rows_of
from coordexp.trainers.runtime import RunSettings


def encode_datasets(arguments: dict[str, Any], settings: RunSettings) -> None:
    """Replace the data sets among the trainer's `arguments` by `EncodedSamples` of the same rows, packed or not.

    Raises RecordError naming samples that are longer than max_length, unless the run is not strict.
    """

    def encoded(lazy: Any) -> EncodedSamples:
        rows, template, strict = rows_of(lazy), arguments["template"], settings.swift["strict"]
        if strict:
            check_lengths(rows, template)
        return EncodedSamples(rows, template, strict=strict, seed=arguments["args"].data_seed or 0)

    for name in ("train_dataset", "eval_dataset"):
        if arguments.get(name) is not None:
            arguments[name] = replace_packed(arguments[name], encoded)
