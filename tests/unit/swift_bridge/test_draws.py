"""Every index of training says when in the run it is drawn, the same with workers, and after a resume."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import SkipBatchSampler
from swift.dataloader import BatchSamplerShard, DataLoaderShard

from coordexp.swift_bridge.draws import Draw, DrawnDataset, DrawSampler, with_draws


def sampler(num_samples: int = 10, skip: int = 0, total: int = 12) -> DrawSampler:
    batches: Any = BatchSamplerShard(num_samples, 2, shuffle=True, drop_last=False, data_seed=3)
    return DrawSampler(SkipBatchSampler(batches, skip) if skip else batches, first=skip, total=total)


def seen(batches: DrawSampler, epoch: int) -> list[tuple[int, int, float]]:
    batches.set_epoch(epoch)
    return [(int(draw), draw.epoch, draw.progress) for batch in batches for draw in batch]


def test_draws_are_the_indices_of_the_sampler_with_their_time():
    plain = BatchSamplerShard(10, 2, shuffle=True, drop_last=False, data_seed=3)
    for epoch in range(3):
        plain.set_epoch(epoch)
        wanted = [
            (index, epoch, min(1.0, (5 * epoch + number) / 12))
            for number, batch in enumerate(plain)
            for index in batch
        ]
        assert seen(sampler(), epoch) == wanted
    assert len(sampler()) == 5


@pytest.mark.parametrize("skip", [1, 4])
def test_a_resumed_epoch_goes_on_with_the_same_draws(skip: int):
    for epoch in (0, 2):
        assert seen(sampler(skip=skip), epoch) == seen(sampler(), epoch)[2 * skip :]


def test_a_draw_is_an_index_and_keeps_its_time():
    draw = Draw(7, epoch=2, progress=0.25)
    assert list(range(10))[draw] == 7
    sent = pickle.loads(pickle.dumps(draw))
    assert (sent, sent.epoch, sent.progress) == (7, 2, 0.25)
    moved = draw.moved(3)
    assert (moved, moved.epoch, moved.progress) == (3, 2, 0.25)
    assert (Draw.of(5).epoch, Draw.of(draw)) == (0, draw)


class Told(DrawnDataset):
    """Gives back what it was asked with."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[int, int, float]:
        draw = Draw.of(index)
        return int(draw), draw.epoch, draw.progress


@pytest.mark.parametrize("workers", [{"num_workers": 0}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_are_told_too(workers: dict[str, Any]):
    batches = BatchSamplerShard(6, 2, shuffle=True, drop_last=False, data_seed=0)
    loader = DataLoaderShard(Told(), batch_sampler=batches, collate_fn=list, **workers)
    args = SimpleNamespace(max_steps=-1, gradient_accumulation_steps=1, num_train_epochs=2.0)
    drawn = with_draws(loader, args, 0)
    for epoch in range(2):
        drawn.set_epoch(epoch)
        samples = [sample for batch in drawn for sample in batch]
        assert sorted(index for index, *_ in samples) == list(range(6))
        assert [(of_epoch, progress) for _, of_epoch, progress in samples] == [
            (epoch, (3 * epoch + number) / 6) for number in range(3) for _ in range(2)
        ]


def test_max_steps_say_how_long_the_run_is():
    batches = BatchSamplerShard(6, 2, shuffle=False, drop_last=False, data_seed=0)
    loader = DataLoaderShard(Told(), batch_sampler=batches, collate_fn=list)
    args = SimpleNamespace(max_steps=5, gradient_accumulation_steps=2, num_train_epochs=1.0)
    assert [batch[0][2] for batch in with_draws(loader, args, 0)] == [0.0, 0.1, 0.2]
