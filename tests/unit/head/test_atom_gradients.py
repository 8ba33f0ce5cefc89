"""Gradients of the loss's terms at the head's input rows: by hand, against autograd, in every head, over ranks."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import support.objective
import torch
from support.stage1_head import ALL_TERMS, Batch, load, make_batch, with_lora
from torch import Tensor, nn

from coordexp.head import atom_gradients
from coordexp.head.atom_gradients import add_gram
from coordexp.head.call import output_head
from coordexp.head.run import RowsHead
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, atom_losses, atom_names, combine, stage1_terms
from coordexp.metrics.catalog import lookup
from coordexp.trainers.step.gradient_probe import GradientProbe, gradient_numbers

TEXT, W1 = "base_ce/loss", "coord_diag/w1"


def test_lengths_and_cosines_of_two_rows_by_hand():
    """An identity for a head, two words of equal logits: cross-entropy pulls a row by (-1/2, 1/2) or (1/2, -1/2)."""
    head = nn.Linear(4, 4, bias=False)
    head.weight.data.copy_(torch.eye(4))
    hidden = torch.tensor([[0.0, 0.0, -90.0, -90.0]] * 2)
    rows = SupervisedRows(torch.arange(2), torch.tensor([0, 1]), 2, torch.empty(0, dtype=torch.int64))
    gram = torch.zeros(2, 2, dtype=torch.float64)

    def losses(inputs: LossInputs) -> list[Tensor]:
        return [inputs.text_ce_R.sum(), 2 * inputs.text_ce_R[0]]

    add_gram(gram, head, hidden, rows, CoordColumns([2, 3]), Stage1Weights().needs(), losses)
    # a = ((-1/2, 1/2), (1/2, -1/2)), b = ((-1, 1), (0, 0)); their sum ((-3/2, 3/2), (1/2, -1/2))
    torch.testing.assert_close(gram, torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert gradient_numbers([TEXT, W1], gram.tolist()) == pytest.approx(
        {
            "gradient/norm/total": math.sqrt(5),
            f"gradient/norm/{TEXT}": 1.0,
            f"gradient/norm/{W1}": math.sqrt(2),
            f"gradient/cos_total/{TEXT}": 2 / math.sqrt(5),
            f"gradient/cos_total/{W1}": 3 / math.sqrt(10),
            f"gradient/cos/{TEXT}/{W1}": 1 / math.sqrt(2),
        }
    )


def test_a_term_without_a_gradient_has_a_length_and_no_cosine():
    numbers = gradient_numbers([TEXT, W1], [[4.0, 0.0], [0.0, 0.0]])
    assert numbers == {
        "gradient/norm/total": 2.0,
        f"gradient/norm/{TEXT}": 2.0,
        f"gradient/norm/{W1}": 0.0,
        f"gradient/cos_total/{TEXT}": 1.0,
    }


@pytest.fixture(scope="module")
def batch(nano: Path) -> Batch:
    return make_batch(nano)


@pytest.fixture(params=["plain", "fused"])
def mode(request, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(atom_gradients, "CHUNK_BYTES", 0)  # several chunks
    return request.param


def probed(model: nn.Module, batch: Batch, mode: str, weights: Stage1Weights, *, watch: bool = True):
    """(numbers of the probe, gradient at the hidden states of all rows, loss, gradients of the weights)."""
    rows, counts = batch.rows, (3.0 * batch.rows.num_text, 2.0 * batch.rows.num_coord)
    logged: dict[str, float] = {}
    probe = GradientProbe(2, batch.columns, torch.device("cpu"), logged.update)
    losses = partial(atom_losses, weights=weights, text_count=counts[0], coord_count=counts[1])
    kept: list[Tensor] = []

    def keep(_head: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(kept.append)

    def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, weights)
        return combine(terms, *counts), terms.detach()

    names = atom_names(weights)
    assert probe.watch(1, names, rows, weights.needs(), losses) is None  # not due
    head_probe = probe.watch(2, names, rows, weights.needs(), losses) if watch else None
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = output_head(unwrapped).register_forward_pre_hook(keep)
    try:
        loss, _ = RowsHead(mode, batch.columns)(
            model, unwrapped, batch.inputs, rows, weights.needs(), objective, probe=head_probe
        )
        loss.backward()
    finally:
        handle.remove()
    probe.on_step_end(None, None, None)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logged, kept[0], loss.item(), grads


@pytest.mark.parametrize(
    "weights", [ALL_TERMS, Stage1Weights(enabled=False)], ids=["all terms", "cross-entropy"]
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_terms_add_up_to_the_gradient_of_the_loss(nano, batch, mode, weights, lora):
    model = load(nano)
    if lora:
        model = with_lora(model, target_modules=["lm_head", "q_proj"])
    numbers, hidden_grad, *_ = probed(model, batch, mode, weights)
    assert numbers["gradient/norm/total"] == pytest.approx(float(hidden_grad.double().norm()), rel=1e-5)
    names = atom_names(weights)
    assert {f"gradient/norm/{name}" for name in names} <= numbers.keys()
    # |sum g|^2 = sum over terms of g . total
    total = numbers["gradient/norm/total"]
    along = sum(numbers[f"gradient/norm/{name}"] * numbers[f"gradient/cos_total/{name}"] for name in names)
    assert along == pytest.approx(total, rel=1e-5)
    assert all(lookup(key) is not None for key in numbers)


def test_plain_and_fused_head_say_the_same_and_training_is_left_as_it_is(nano, batch):
    by_mode = {}
    for mode in ("plain", "fused"):
        numbers, _, loss, grads = probed(load(nano), batch, mode, ALL_TERMS)
        unwatched, _, loss_alone, grads_alone = probed(load(nano), batch, mode, ALL_TERMS, watch=False)
        assert unwatched == {}
        assert loss == loss_alone
        assert all(torch.equal(grads[name], grads_alone[name]) for name in grads_alone)
        by_mode[mode] = numbers
    assert by_mode["plain"] == pytest.approx(by_mode["fused"], rel=1e-6, abs=1e-9)
    text, w1 = by_mode["plain"][f"gradient/cos_total/{TEXT}"], by_mode["plain"][f"gradient/cos/{TEXT}/{W1}"]
    assert text > 0
    assert w1 == 0  # of different rows


def test_chunks_do_not_matter(nano, batch, monkeypatch):
    whole, *_ = probed(load(nano), batch, "plain", ALL_TERMS)
    monkeypatch.setattr(atom_gradients, "CHUNK_BYTES", 0)
    assert probed(load(nano), batch, "plain", ALL_TERMS)[0] == pytest.approx(whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", list(ForwardKind))
def test_the_atoms_of_stage_2_add_up_to_its_loss(kind):
    objective = Stage2Objective(support.objective.make_spec())
    logits, rows = support.objective.make_batch()
    counts = {name: 2 * count for name, count in objective.counts(rows, kind).items()}
    logits_RV = logits[rows.positions_R].requires_grad_()
    inputs = LossInputs.from_logits(logits_RV, rows, support.objective.COLUMNS, objective.needs(kind))
    losses = objective.atom_losses(inputs, kind, counts)
    assert list(losses) == objective.atom_names(kind)
    assert {f"loss/{name}" for name in support.objective.PROVENANCES[kind]} == set(losses)
    (expected,) = torch.autograd.grad(objective(inputs, kind, counts)[0], logits_RV, retain_graph=True)
    found = sum(torch.autograd.grad(loss, logits_RV, retain_graph=True)[0] for loss in losses.values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_forwards_of_a_step_add_up_and_fillers_do_not():
    logged: dict[str, float] = {}
    columns, weights = CoordColumns(range(100, 600)), Stage1Weights()
    probe = GradientProbe(1, columns, torch.device("cpu"), logged.update)
    head, hidden = nn.Linear(8, 600, bias=False), torch.randn(3, 8)
    rows = SupervisedRows(torch.arange(3), torch.tensor([1, 2, 3]), 3, torch.empty(0, dtype=torch.int64))

    def losses(inputs: LossInputs) -> dict[str, Tensor]:
        return {TEXT: inputs.text_ce_R.sum()}

    for counts in (True, True, False):
        look = probe.watch(0, [W1, TEXT], rows, weights.needs(), losses, counts=counts)
        assert (look is None) is not counts
        if look is not None:
            look(head, hidden)
    one = torch.zeros(1, 1, dtype=torch.float64)
    add_gram(one, head, hidden, rows, columns, weights.needs(), lambda inputs: [inputs.text_ce_R.sum()])
    probe.on_step_end(None, None, None)
    assert logged[f"gradient/norm/{TEXT}"] == pytest.approx(math.sqrt(2 * float(one)))
    assert logged[f"gradient/norm/{W1}"] == 0
