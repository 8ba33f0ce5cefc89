"""The forwards of a step: who runs how many, over which entries, with which token types."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.schema import BoxObject
from coordexp.codec.token_types import TokenType
from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.packing.position_ids import VisionLayout
from coordexp.targets.builder import TargetBuilder
from coordexp.trainers.step.plan import Layout, on_device, plan_forwards, spread, with_token_types


@pytest.fixture(scope="module")
def tok():
    return train_tiny_tokenizer()


@pytest.fixture(scope="module")
def samples(tok):
    """Three samples of one, two and three boxes."""
    builder = TargetBuilder(tok)
    prompt = tok.encode("What is there?", add_special_tokens=False)
    boxes = [BoxObject(name, "bbox_2d", (1, 2, 30, 40)) for name in ("red box", "blue box", "dog")]
    return [builder.from_ground_truth(prompt, boxes[: n + 1], sample_id=f"data:{n}") for n in range(3)]


def layout(tok, packing_length, batch_size=2):
    columns = CoordColumns(CoordVocab.from_tokenizer(tok).ids)
    return Layout(
        columns, VisionLayout(image_token_id=0, spatial_merge_size=2), 0, packing_length, batch_size
    )


def own(number):
    """A rank alone: its number of forwards is the largest."""
    return number


def plan(samples, layout, agree, *, filler):
    return plan_forwards(layout.groups(samples), layout, agree, filler=filler)


def ids_of(forwards):
    return [[sample.sample_id for sample in forward.batch.samples] for forward in forwards]


def test_padded_forwards_hold_batch_size_samples_in_order(tok, samples):
    forwards = plan(samples, layout(tok, None), own, filler=samples[0])
    assert ids_of(forwards) == [["data:0", "data:1"], ["data:2"]]
    assert forwards[0].batch.attention_mask is not None


def test_packs_hold_at_most_packing_length_tokens_and_every_sample_once(tok, samples):
    capacity = samples[0].num_tokens + samples[1].num_tokens
    forwards = plan(samples, layout(tok, capacity), own, filler=samples[0])
    assert all(forward.batch.num_tokens <= capacity for forward in forwards)
    assert sorted(chain(*ids_of(forwards))) == ["data:0", "data:1", "data:2"]


def test_a_rank_that_is_short_repeats_its_last_forward_without_weight(tok, samples):
    forwards = plan(samples, layout(tok, None), lambda _: 4, filler=samples[0])
    assert [forward.counts for forward in forwards] == [True, True, False, False]
    assert ids_of(forwards)[2:] == [["data:2"]] * 2


def test_a_rank_without_samples_runs_the_filler_without_weight(tok, samples):
    forwards = plan([], layout(tok, None), lambda _: 2, filler=samples[1])
    assert [(forward.counts, ids) for forward, ids in zip(forwards, ids_of(forwards), strict=True)] == [
        (False, ["data:1"])
    ] * 2


def test_more_forwards_than_agreed_is_an_error(tok, samples):
    with pytest.raises(ContractError, match="2 forwards on this rank, but all ranks agreed on 1"):
        plan(samples, layout(tok, None), lambda _: 1, filler=samples[0])


@given(st.integers(1, 40), st.integers(1, 12))
def test_spread_keeps_the_order_and_never_leaves_the_last_entry_empty(num_forwards, num_entries):
    entries = spread(list(range(num_forwards)), num_entries)
    assert len(entries) == num_entries
    assert list(chain(*entries)) == list(range(num_forwards))
    assert entries[-1]
    sizes = [len(entry) for entry in entries]
    assert max(sizes) - min(sizes) <= 1


def test_token_types_are_those_of_the_targets_of_the_rows(tok, samples):
    (forward,) = plan(samples, layout(tok, 1000), own, filler=samples[0])
    rows = with_token_types(forward, {"data:0", "data:2"}).rows
    flat = forward.batch.input_ids_BT.flatten()
    assert torch.equal(flat[rows.positions_R + 1], rows.targets_R)
    first, second = forward.batch.starts[1], forward.batch.starts[2]
    names = {sample.sample_id: sample for sample in samples}
    for position, row_type in zip(rows.positions_R.tolist(), rows.types_R.tolist(), strict=True):
        if first <= position + 1 < second:
            assert row_type == TokenType.IGNORE
        else:
            sample = names["data:0"] if position + 1 < first else names["data:2"]
            start = 0 if position + 1 < first else second
            assert row_type == sample.types_T[position + 1 - start] != TokenType.IGNORE


def test_rows_keep_everything_on_their_way_to_the_device(tok, samples):
    (forward,) = plan(samples, layout(tok, 1000), own, filler=samples[0])
    rows = with_token_types(forward, {"data:0"}).rows
    moved = on_device(rows, torch.device("cpu"))
    assert (moved.num_text, moved.group) == (rows.num_text, rows.group)
    for name in ("positions_R", "targets_R", "bins_N", "roles_R", "dropped_invalid_R", "types_R"):
        assert torch.equal(getattr(moved, name), getattr(rows, name))
