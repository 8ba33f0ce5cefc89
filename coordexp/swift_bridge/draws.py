"""When in a run a sample is drawn: its epoch, and how far the run has come. Told by the sampler with every index.

A data-loader worker fetches ahead of the training loop and is copied from the main process at some earlier time, so it
can know neither on its own. An index that carries both makes a sample the same wherever and whenever it is made, also
after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import SkipBatchSampler
from swift.dataloader import DataLoaderShard
from torch.utils.data import Dataset


class Draw(int):
    """An index into a data set. epoch: from 0.  progress: of the run, from 0 to 1."""

    epoch: int
    progress: float

    def __new__(cls, index: int, epoch: int = 0, progress: float = 0.0) -> Draw:
        draw = super().__new__(cls, index)
        draw.epoch, draw.progress = epoch, progress
        return draw

    @classmethod
    def of(cls, index: int) -> Draw:
        """An index as a draw; a plain one is of the start of the run."""
        return index if isinstance(index, Draw) else cls(index)

    def moved(self, index: int) -> Draw:
        """Another index at the same time."""
        return Draw(index, self.epoch, self.progress)


class DrawnDataset(Dataset[Any]):
    """A data set whose samples depend on more than their index: it is asked with `Draw`s in training."""

    def lengths_in(self, epoch: int) -> Sequence[int] | None:
        """Tokens of all samples in an epoch; None where they are those of the first epoch, which "lengths" tells."""
        return None

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sample of all epochs; None where the first epoch tells it."""
        return None


class DrawSampler:
    """The batches of a sampler, their indices as `Draw`s.

    batches: ms-swift's sampler of this rank, or what is left of it after the first batches of an epoch.
    first: batches of the epoch that are skipped.  total: batches of this rank in the whole run.
    """

    def __init__(self, batches: Any, *, first: int, total: int) -> None:
        self._batches, self._first, self._total = batches, first, total
        self._all = batches.batch_sampler if isinstance(batches, SkipBatchSampler) else batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._all.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        before = self.epoch * len(self._all)
        for number, batch in enumerate(self._batches, start=self._first):
            progress = min(1.0, (before + number) / self._total)
            yield [Draw(index, self.epoch, progress) for index in batch]


def with_draws(loader: Any, args: Any, skip_batches: int) -> Any:
    """The data loader of training, asking with `Draw`s.

    loader: ms-swift's.  args: of the trainer, for the length of the run.
    """
    batches = loader.batch_sampler
    of_epoch = len(batches.batch_sampler if isinstance(batches, SkipBatchSampler) else batches)
    steps = args.max_steps * args.gradient_accumulation_steps
    total = steps if steps > 0 else math.ceil(args.num_train_epochs * of_epoch)
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        batch_sampler=DrawSampler(batches, first=skip_batches, total=max(1, total)),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
