"""ms-swift's packs of a dataset: several samples in one sequence, kept apart by their position ids.

ms-swift makes them itself for `packing: true`, which it allows under flash attention only. A trainer may ask for the
same packs under any attention implementation: transformers keeps samples apart by the text row of the position ids
(see `coordexp.swift_bridge.template`), under sdpa and eager attention with a mask of [T, T] for a pack of T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swift.dataset import PackingDataset
from swift.dataset.packing import calculate_matched_group

from coordexp.errors import ConfigError
from coordexp.swift_bridge.draws import Draw, DrawnDataset


class DrawnPacks(PackingDataset, DrawnDataset):
    """Packs whose samples are drawn at the time at which the pack is.

    Where every epoch has samples of its own, they are packed for it: into as many packs as the first epoch has.
    """

    _laid_out: tuple[int, list[list[int]]] | None = None
    """An epoch after the first and its packs."""

    def __getitem__(self, index: int) -> list[Any]:
        draw = Draw.of(index)
        return [self.dataset[draw.moved(sample)] for sample in self.packs_in(draw.epoch)[index]]

    def packs_in(self, epoch: int) -> list[list[int]]:
        """The samples of every pack of an epoch."""
        lengths = self.dataset.lengths_in(epoch) if epoch and isinstance(self.dataset, DrawnDataset) else None
        if lengths is None:
            packs: list[list[int]] = self.packed_idx
            return packs
        if self._laid_out is None or self._laid_out[0] != epoch:
            self._laid_out = (epoch, self._lay_out(lengths))
        return self._laid_out[1]

    def _lay_out(self, lengths: Sequence[int]) -> list[list[int]]:
        packs: list[list[tuple[int, int]]] = []
        left: list[tuple[int, int]] = []
        for start in range(0, len(lengths), self.PACKING_BATCH_SIZE):
            part = list(enumerate(lengths[start : start + self.PACKING_BATCH_SIZE], start))
            full, left = calculate_matched_group(
                left + part,
                self.packing_length,
                is_finished=start + self.PACKING_BATCH_SIZE >= len(lengths),
                strategy=self.packing_strategy,
            )
            packs += full
        return [[index for index, _ in pack] for pack in as_many(packs, len(self.packed_idx))]


def as_many(packs: list[list[tuple[int, int]]], number: int) -> list[list[tuple[int, int]]]:
    """So many packs of (sample, tokens): without the emptiest ones, or with the first ones again."""
    if len(packs) <= number:
        return [packs[index % len(packs)] for index in range(number)]
    fullest_first = sorted(range(len(packs)), key=lambda index: -sum(tokens for _, tokens in packs[index]))
    return [packs[index] for index in sorted(fullest_first[:number])]


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


def packed_lengths(dataset: Any) -> list[int] | None:
    """Tokens of each pack; None for a dataset that is not packed."""
    return list(dataset.packed_length) if isinstance(dataset, PackingDataset) else None


def replace_packed(dataset: Any, replacement: Callable[[Any], Any]) -> Any:
    """`replacement` of a dataset; of a packed one, packs of the `replacement` of its samples."""
    if not isinstance(dataset, PackingDataset):
        return replacement(dataset)
    dataset.dataset = replacement(dataset.dataset)
    return dataset


def _check_lengths(dataset: Any, packing_length: int) -> None:
    longest = dataset.longest if isinstance(dataset, DrawnDataset) else None
    if longest is None:
        lengths = [sum(length) if isinstance(length, list) else length for length in dataset["lengths"]]
        longest = max(lengths, default=0)
    if longest > packing_length:
        raise _too_long(longest, packing_length)


def _too_long(length: int, packing_length: int) -> ConfigError:
    return ConfigError(
        f"packing_length {packing_length}: a sample has {length} tokens, and a sample is never cut; raise "
        "packing_length, or lower max_length so that such samples are refused by name."
    )
