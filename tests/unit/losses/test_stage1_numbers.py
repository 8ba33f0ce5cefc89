"""Numbers per original sample, and the parts of the loss that debug mode adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.objective import check_atoms_sum
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms
from coordexp.losses.stage1_numbers import (
    finish_parts,
    finish_per_sample,
    loss_shares,
    part_losses,
    part_sums,
    per_sample_sums,
)
from coordexp.losses.sums import SumCount
from coordexp.metrics.accumulate import MetricStore


def pair(total: float, count: float) -> SumCount:
    return SumCount(torch.tensor(total), torch.tensor(count))


def terms(text: SumCount, coord: SumCount, coord_ce: SumCount | None = None) -> Stage1Terms:
    """Terms of a forward; only the sums that the numbers here are made of."""
    num_coord = int(coord.count)
    return Stage1Terms(
        coord_ce is None, int(text.count), text, coord, coord_ce, {}, {}, torch.zeros(num_coord)
    )


def window(*micro_batches: tuple[Stage1Terms, int], mode: str = "train") -> dict[str, float]:
    store = MetricStore(strict=True)
    for one, num_samples in micro_batches:
        store.add_all(one.metrics() | per_sample_sums(one, num_samples), mode=mode)
    metrics = store.flush(mode)
    finish_per_sample(metrics, mode)
    return metrics


def test_sums_over_the_window_are_divided_by_its_samples():
    # Packs of 3 and 1 samples: 40 text rows worth 20 nats, 8 coordinate rows worth 6.
    metrics = window((terms(pair(15, 30), pair(6, 8)), 3), (terms(pair(5, 10), pair(0, 0)), 1))
    assert metrics["base_ce/noncoord_tokens_per_sample"] == 10
    assert metrics["base_ce/loss_per_sample"] == 5
    assert metrics["coord_diag/coord_tokens_per_sample"] == 2  # the sample without boxes counts as well
    assert metrics["coord_diag/loss_per_sample"] == 1.5
    assert metrics["stage1/total_loss_per_sample_est"] == 6.5


def test_without_coordinate_rows_there_is_no_coordinate_number():
    metrics = window((terms(pair(15, 30), pair(0, 0)), 3), mode="eval")
    assert {key for key in metrics if "per_sample" in key} == {
        "eval_base_ce/noncoord_tokens_per_sample",
        "eval_base_ce/loss_per_sample",
        "eval_stage1/total_loss_per_sample_est",
    }
    assert metrics["eval_stage1/total_loss_per_sample_est"] == 5


CASES = {
    "coordinate loss": (terms(pair(15, 30), pair(6, 8)), {"text": 0.25, "coord": 0.5}),
    "pure cross-entropy": (
        terms(pair(15, 30), pair(6, 8), pair(21, 8)),
        {"text": 15 / 72, "coord_ce": 21 / 72},
    ),
    "no coordinate rows": (terms(pair(15, 30), pair(0, 0)), {"text": 0.25, "coord": 0.0}),
}


@pytest.mark.parametrize(("one", "expected"), CASES.values(), ids=list(CASES))
def test_the_parts_of_a_loss_add_up_to_it(one: Stage1Terms, expected: dict[str, float]):
    # A step of 60 text and 12 coordinate rows.
    shares = loss_shares(one, 60, 12)
    assert shares == pytest.approx(expected)
    loss = float(combine(one, 60, 12))
    check_atoms_sum(loss, shares)
    with pytest.raises(ContractError, match="is not the sum"):
        check_atoms_sum(loss * 1.001, shares)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("chunk_rows", [4, 7, 100])
def test_each_data_set_has_its_own_sums(enabled, chunk_rows):
    """Rows of two data sets of three, against the terms of each data set's rows alone; in chunks as in one piece."""
    generator = torch.Generator().manual_seed(0)
    columns, weights = CoordColumns(range(10, 20)), Stage1Weights(enabled=enabled, ce_weight=0.5)
    targets_R = torch.randint(0, 20, (30,), generator=generator)
    logits_RV = torch.randn(30, 20, generator=generator)
    rows = SupervisedRows.from_targets(targets_R, columns)
    parts_R = torch.randint(0, 2, (30,), generator=generator, dtype=torch.int8) * 2  # of 0 and 2
    rows = replace(rows, parts_R=parts_R, num_parts=3)
    logits_RV = logits_RV[rows.positions_R]

    def terms_of(rows: SupervisedRows, logits_RV: torch.Tensor) -> Stage1Terms:
        return stage1_terms(LossInputs.from_logits(logits_RV, rows, columns, weights.needs()), weights)

    found = Stage1Terms.merge([terms_of(piece, logits_RV[at]) for at, piece in rows.chunks(chunk_rows)])
    store = MetricStore(strict=True)
    names = ("a", "nobody", "c")
    store.add_all(part_sums(found, names) | part_losses(found, names), mode="eval")
    metrics = store.flush("eval")
    finish_parts(metrics, "eval", names)
    assert not [key for key in metrics if "nobody" in key]  # absent is not zero
    for name, part in (("a", 0), ("c", 2)):
        at = (parts_R == part).nonzero().squeeze(-1)
        own = SupervisedRows.from_targets(rows.targets_R[at], columns)
        terms = terms_of(own, logits_RV[at][own.positions_R])
        assert metrics[f"eval_dataset/{name}/base_ce/loss"] == pytest.approx(
            float(terms.text.mean()), rel=1e-5
        )
        assert metrics[f"eval_dataset/{name}/coord_diag/loss"] == pytest.approx(
            float(terms.coord.mean()), rel=1e-5
        )
        assert metrics[f"eval_dataset/{name}/coord_diag/coord_tokens"] == own.num_coord
        loss = combine(terms, terms.text.count, terms.coord.count)
        assert metrics[f"eval_dataset/{name}/loss"] == pytest.approx(float(loss), rel=1e-5)
