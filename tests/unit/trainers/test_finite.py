"""The guard against losses that are not finite: what it names, and that it stops every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from coordexp.trainers.finite import FiniteLossGuard, NonFiniteLossError

ONE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("-inf"))


def test_finite_steps_pass():
    guard = FiniteLossGuard()
    for step in (1, 2):
        guard.watch({"text": ONE, "coord": ONE})
        guard.check(step)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_message_names_step_micro_batch_and_term(bad):
    guard = FiniteLossGuard()
    guard.watch({"text": ONE, "coord": ONE})
    guard.watch({"text": ONE, "coord": bad})
    with pytest.raises(NonFiniteLossError, match=r"step 7 \(rank 0, micro-batch 1: coord\)"):
        guard.check(7)


def test_a_step_does_not_remember_the_one_before():
    guard = FiniteLossGuard()
    guard.watch({"text": NAN})
    with pytest.raises(NonFiniteLossError):
        guard.check(1)
    guard.watch({"text": ONE})
    guard.check(2)


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    guard = FiniteLossGuard()
    guard.watch({"text": NAN if rank == 1 else ONE, "coord": ONE})
    try:
        guard.check(3)
    except NonFiniteLossError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_one_bad_rank_stops_both(tmp_path: Path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    messages = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "step 3 (rank 1, micro-batch 0: text)" in messages[0]
