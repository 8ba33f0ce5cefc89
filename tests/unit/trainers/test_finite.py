"""The guard against losses that are not finite: what it names, and that it stops every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from coordexp.trainers.finite import DropUpdate, FiniteLossGuard, NonFiniteLossError

ONE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("-inf"))


def test_finite_steps_pass_and_tell_their_loss():
    guard = FiniteLossGuard()
    for step in (1, 2):
        guard.watch({"text": ONE, "coord": ONE}, loss=step * ONE)
        guard.watch({"text": ONE, "coord": ONE}, loss=0.5 * ONE)
        assert guard.check(step, said=step) == (step + 0.5, step)


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


def test_message_names_the_samples_of_the_bad_micro_batch():
    guard = FiniteLossGuard()
    guard.watch({"text": ONE, "coord": ONE}, ["a.jsonl:1"])
    guard.watch({"text": NAN, "coord": INF}, [f"a.jsonl:{line}" for line in range(2, 13)])
    with pytest.raises(NonFiniteLossError) as caught:
        guard.check(7)
    shown = ", ".join(f"a.jsonl:{line}" for line in range(2, 10))
    assert f"(rank 0, micro-batch 1: text, coord, of {shown} and 3 more)" in str(caught.value)
    assert "a.jsonl:1," not in str(caught.value)


def test_a_skipped_step_leaves_weights_and_moments_alone(caplog):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    guard, skipped = FiniteLossGuard("skip_step"), []
    callback = DropUpdate(guard, lambda: skipped.append(len(history)))
    history = []
    for step, factor in enumerate([1.0, float("nan"), 1.0], start=1):
        loss = (factor * weight).sum()
        guard.watch({"text": loss}, ["a.jsonl:5"])
        guard.check(step)
        loss.backward()
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        history.append((weight.detach().clone(), int(optimizer.state[weight]["step"])))
    (first, after_one), (second, after_two), (third, after_three) = history
    assert torch.equal(first, second)
    assert (after_one, after_two, after_three) == (1, 1, 2)
    assert bool((third < second).all())
    assert skipped == [1]
    [record] = caplog.records
    assert "step 2 (rank 0, micro-batch 0: text, of a.jsonl:5). The step is skipped" in record.getMessage()


def test_a_skipped_step_passes_the_gradient_scaler_of_fp16():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = FiniteLossGuard("skip_step")
    callback = DropUpdate(guard, lambda: None, lambda: scaler.unscale_(optimizer))
    for factor in (float("nan"), 1.0):
        loss = (factor * weight).sum()
        guard.watch({"text": loss})
        guard.check(1)
        scaler.scale(loss).backward()
        callback.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert weight.tolist() == [0.5, 1.5]  # the second step alone
    assert scaler.get_scale() == 4.0  # the first one's overflow was seen


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    guard = FiniteLossGuard()
    guard.watch({"text": ONE, "coord": ONE}, loss=(rank + 1) * ONE)
    # the mean over ranks, and what one of them says
    assert guard.check(2, said=3 if rank == 0 else 0) == (1.5, 3)
    for _ in range(2 * rank):  # ranks may train different numbers of micro-batches
        guard.watch({"text": ONE, "coord": ONE}, ["fine.jsonl:1"])
    guard.watch({"text": NAN if rank == 1 else ONE, "coord": ONE}, [f"rank{rank}.jsonl:4"])
    try:
        guard.check(3)
    except NonFiniteLossError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_one_bad_rank_stops_both_and_all_hear_what_one_says(tmp_path: Path):
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    messages = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "step 3 (rank 1, micro-batch 2: text, of rank1.jsonl:4)" in messages[0]
