"""The plan of a step: who runs how many forwards, over which entries, with which token types."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.steps import assembly, box, layout, raw

from coordexp.codec.token_types import TokenType
from coordexp.control.schedule import Channel
from coordexp.data.batch_meta import BatchMeta
from coordexp.errors import ContractError
from coordexp.losses.inputs import SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.targets.builder import TargetBuilder
from coordexp.trainers.step.plan import PlannedForward, StepPlan


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


@pytest.fixture(scope="module")
def raws(tok):
    """Three samples of one, two and three boxes."""
    boxes = [box(name, 1, 2, 30, 40) for name in ("red box", "blue box", "dog")]
    return [raw(tok, n, *boxes[: n + 1]) for n in range(3)]


@pytest.fixture(scope="module")
def samples(tok, raws):
    builder = TargetBuilder(tok)
    return [builder.from_ground_truth(one.prompt_ids, one.objects, sample_id=one.sample_id) for one in raws]


def plan(tok, raws, samples, packing_length, agree=lambda number: number, filler=None):
    return assembly(tok, packing_length, agree=agree)(
        raws,
        samples,
        step=4,
        channel=Channel.A,
        kinds=(ForwardKind.TEACHER_FORCED,),
        filler=filler or (lambda: pytest.fail("no filler is needed")),
    )


def ids_of(forwards):
    return [list(forward.meta.sample_ids) for forward in forwards]


def test_padded_forwards_hold_batch_size_samples_in_order(tok, raws, samples):
    forwards = plan(tok, raws, samples, None).forwards
    assert ids_of(forwards) == [["data.jsonl:0", "data.jsonl:1"], ["data.jsonl:2"]]
    assert forwards[0].inputs["attention_mask"].sum(1).tolist() == [s.num_tokens for s in samples[:2]]


def test_packs_hold_at_most_packing_length_tokens_and_every_sample_once(tok, raws, samples):
    capacity = samples[0].num_tokens + samples[1].num_tokens
    forwards = plan(tok, raws, samples, capacity).forwards
    assert all(forward.inputs["input_ids"].numel() <= capacity for forward in forwards)
    assert sorted(chain(*ids_of(forwards))) == ["data.jsonl:0", "data.jsonl:1", "data.jsonl:2"]


def test_totals_are_those_of_the_samples_and_fillers_add_nothing(tok, raws, samples):
    alone = plan(tok, raws, samples, None)
    helped = plan(tok, raws, samples, None, agree=lambda _: 4)
    assert alone.totals == helped.totals
    assert float(alone.totals["A2_coord/boxes"]) == 1 + 2 + 3
    assert [forward.is_filler for forward in helped.forwards] == [False, False, True, True]
    assert ids_of(helped.forwards)[2:] == [["data.jsonl:2"]] * 2
    assert ids_of(helped.counted) == ids_of(alone.forwards)
    assert (alone.step, alone.channel) == (4, Channel.A)


def test_a_rank_without_samples_runs_the_filler_without_weight(tok, raws, samples):
    found = plan(tok, raws, [], None, agree=lambda _: 2, filler=lambda: samples[1])
    assert [(forward.is_filler, list(forward.meta.sample_ids)) for forward in found.forwards] == [
        (True, ["data.jsonl:1"])
    ] * 2
    assert {float(total) for total in found.totals.values()} == {0.0}


def test_more_forwards_than_agreed_is_an_error(tok, raws, samples):
    with pytest.raises(ContractError, match="2 forwards on this rank, but all ranks agreed on 1"):
        plan(tok, raws, samples, None, agree=lambda _: 1)


NO_ROWS = BatchMeta(SupervisedRows(torch.zeros(0), torch.zeros(0), 0, torch.zeros(0)), (), 0)


@given(st.integers(1, 40), st.integers(1, 12))
def test_entries_keep_the_order_and_never_leave_the_last_one_empty(num_forwards, num_entries):
    forwards = tuple(PlannedForward({"number": number}, NO_ROWS) for number in range(num_forwards))
    entries = StepPlan(0, (ForwardKind.ROLLOUT,), forwards, {}).entries(num_entries)
    assert len(entries) == num_entries
    assert [forward.inputs["number"] for forward in chain(*entries)] == list(range(num_forwards))
    assert entries[-1]
    sizes = [len(entry) for entry in entries]
    assert max(sizes) - min(sizes) <= 1


def test_token_types_are_those_of_the_targets_of_the_rows(tok, samples):
    forward = layout(tok, 1000).forward(samples, {"data.jsonl:0", "data.jsonl:2"})
    rows, flat = forward.meta.rows, forward.inputs["input_ids"].flatten()
    assert torch.equal(flat[rows.positions_R + 1], rows.targets_R)
    first = samples[0].num_tokens
    second = first + samples[1].num_tokens
    for position, row_type in zip(rows.positions_R.tolist(), rows.types_R.tolist(), strict=True):
        if first <= position + 1 < second:
            assert row_type == TokenType.IGNORE
        else:
            sample, start = (samples[0], 0) if position + 1 < first else (samples[2], second)
            assert row_type == sample.types_T[position + 1 - start] != TokenType.IGNORE


def test_slots_are_the_coordinate_tokens_of_the_boxes(tok, samples):
    forward = layout(tok, None).forward(samples[:2])
    columns = layout(tok, None).columns
    ids = forward.inputs["input_ids"].flatten()[forward.slots_N].tolist()
    assert ids == [columns.ids[k] for k in (1, 2, 30, 40)] * 3


def test_rows_keep_everything_on_their_way_to_the_device(tok, samples):
    forward = layout(tok, 1000).forward(samples, {"data.jsonl:0"})
    moved = forward.on(torch.device("cpu"), forward.inputs)
    rows, arrived = forward.meta.rows, moved.meta.rows
    assert (arrived.num_text, arrived.num_boxes) == (rows.num_text, rows.num_boxes)
    for name in ("positions_R", "targets_R", "bins_N", "roles_R", "dropped_invalid_R", "types_R"):
        assert torch.equal(getattr(arrived, name), getattr(rows, name))
    assert torch.equal(moved.slots_N, forward.slots_N)


def test_meta_travels_through_a_batch_unchanged(tok, samples):
    meta = layout(tok, 1000).forward(samples, {"data.jsonl:0"}).meta
    batch = {"input_ids": torch.zeros(1, 3)}
    meta.put(batch)
    assert BatchMeta.of(batch).sample_ids == meta.sample_ids
    taken = BatchMeta.take(batch)
    assert list(batch) == ["input_ids"]
    assert (taken.num_samples, taken.types_skipped) == (3, False)
    assert torch.equal(taken.rows.types_R, meta.rows.types_R)
    assert taken.rows.num_boxes == 1 + 2 + 3
