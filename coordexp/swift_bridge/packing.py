"""ms-swift's packs of a dataset: several samples in one sequence, kept apart by their position ids.

ms-swift makes them itself for `packing: true`, which it allows under flash attention only. A trainer may ask for the
same packs under any attention implementation: transformers keeps samples apart by the text row of the position ids
(see `coordexp.swift_bridge.template`), under sdpa and eager attention with a mask of [T, T] for a pack of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swift.dataset import PackingDataset

from coordexp.errors import ConfigError
from coordexp.swift_bridge.draws import Draw, DrawnDataset


class DrawnPacks(PackingDataset, DrawnDataset):
    """Packs whose samples are drawn at the time at which the pack is."""

    def __getitem__(self, index: int) -> list[Any]:
        draw = Draw.of(index)
        return [self.dataset[draw.moved(sample)] for sample in self.packed_idx[index]]


def pack_dataset(
    dataset: Any, template: Any, packing_length: int, arguments: Mapping[str, Any]
) -> PackingDataset:
    """The packs of an encoded dataset, or the dataset itself where it is packed already.

    From now on `template` collates all batches into one sequence.

    Args:
        dataset: encoded samples, which give their lengths under "lengths".
        packing_length: tokens of a pack at most.
        arguments: ms-swift's arguments, flat; `packing_strategy` and the process settings are read.

    Raises:
        ConfigError: a sample is longer than a pack.
    """
    if not isinstance(dataset, PackingDataset):
        _check_lengths(dataset, packing_length)
        dataset = DrawnPacks(
            template,
            dataset,
            packing_length=packing_length,
            packing_strategy=arguments["packing_strategy"],
            strict=arguments["strict"],
            multiprocessing_context=arguments.get("dataloader_multiprocessing_context"),
        )
    longest = max(dataset.packed_length, default=0)
    if longest > packing_length:
        raise _too_long(longest, packing_length)
    return dataset


def unpacked(dataset: Any) -> Any:
    """The samples of a packed dataset, one by one; any other dataset as it is."""
    return dataset.dataset if isinstance(dataset, PackingDataset) else dataset


def replace_packed(dataset: Any, replacement: Callable[[Any], Any]) -> Any:
    """`replacement` of a dataset; of a packed one, packs of the `replacement` of its samples."""
    if not isinstance(dataset, PackingDataset):
        return replacement(dataset)
    dataset.dataset = replacement(dataset.dataset)
    return dataset


def _check_lengths(dataset: Any, packing_length: int) -> None:
    lengths = [sum(length) if isinstance(length, list) else length for length in dataset["lengths"]]
    if max(lengths, default=0) > packing_length:
        raise _too_long(max(lengths), packing_length)


def _too_long(length: int, packing_length: int) -> ConfigError:
    return ConfigError(
        f"packing_length {packing_length}: a sample has {length} tokens, and a sample is never cut; raise "
        "packing_length, or lower max_length so that such samples are refused by name."
    )
