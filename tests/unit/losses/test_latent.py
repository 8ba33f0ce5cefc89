"""Terms of the latent objective against float64 references written out with loops, values and gradients.

Takes about 4 s, most of it imports.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coordexp.config.schema.latent_prefix import LatentPrefixSettings
from coordexp.errors import ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.latent.answers import answer_places, first_open, within
from coordexp.losses.latent.objective import LatentInputs, LatentObjective
from coordexp.losses.latent.terms import TeacherRows, align_samples, kd_rows, state_kd_rows
from coordexp.losses.stage1 import Stage1Weights, combine, stage1_terms

V, R, H = 23, 7, 5
COLUMNS = CoordColumns(range(10, 20))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- references ---


def softmax(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    exps = [math.exp((z - top) / temperature) for z in row]
    return [e / sum(exps) for e in exps]


def kd_reference(student: list[float], teacher: list[float], temperature: float, top_k: int | None) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if top_k is None:
        return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    kept = sorted(range(len(p)), key=lambda k: -p[k])[:top_k]
    value = sum(p[k] * math.log(p[k] / q[k]) for k in kept)
    rest_p, rest_q = (sum(x for k, x in enumerate(probs) if k not in kept) for probs in (p, q))
    return temperature**2 * (value + rest_p * math.log(rest_p / rest_q))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [1, 4, V - 1, None])
def test_kd_is_the_divergence_over_the_kept_tokens_and_the_rest(temperature: float, top_k: int | None):
    student, teacher = 4 * randn(R, V, seed=1), 4 * randn(R, V, seed=2)
    parts = [TeacherRows.of_logits(part, top_k=top_k, temperature=temperature) for part in teacher.split(3)]
    found = kd_rows(student, TeacherRows.joined(parts), temperature)
    wanted = [
        kd_reference(s, t, temperature, top_k)
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    rounded = TeacherRows.of_logits(teacher.float(), top_k=top_k, temperature=temperature)
    in_float32 = kd_rows(student.float(), rounded, temperature)
    torch.testing.assert_close(in_float32.double(), found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("top_k", [3, None])
def test_gradients_of_kd(top_k: int | None):
    teacher = TeacherRows.of_logits(3 * randn(3, 9, seed=2), top_k=top_k, temperature=2.0)
    student = randn(3, 9, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_rows(z, teacher, 2.0), (student,))


def test_a_student_that_agrees_with_its_teacher_has_no_divergence():
    logits = 30 * randn(R, V)  # masses of 1e-40 among the rest
    for top_k in (1, 5, None):
        teacher = TeacherRows.of_logits(logits, top_k=top_k, temperature=1.0)
        student = logits.clone().requires_grad_()
        rows = kd_rows(student, teacher, 1.0)
        rows.sum().backward()
        assert rows.abs().max() < 1e-12
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-12


def test_a_teacher_that_is_certain_leaves_finite_numbers():
    logits = torch.full((1, V), -1000.0, dtype=torch.float32)
    logits[0, 3] = 0.0
    student = torch.zeros(1, V, requires_grad=True)
    value = kd_rows(student, TeacherRows.of_logits(logits, top_k=2, temperature=1.0), 1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(V))
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_states_and_vectors_are_compared_relative_to_what_they_should_be():
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    assert state_kd_rows(student, teacher).tolist() == pytest.approx([1 / 2, 13 / 4])
    vectors, means = randn(2, 3, H, seed=3), randn(2, 3, H, seed=4)
    wanted = [
        sum((v - m) ** 2 for v, m in zip(vs, ms, strict=True)) / sum(m**2 for m in ms)
        for vs, ms in zip(vectors.flatten(1).tolist(), means.flatten(1).tolist(), strict=True)
    ]
    assert align_samples(vectors, means).tolist() == pytest.approx(wanted, rel=1e-12)
    assert align_samples(means, means).tolist() == [0, 0]
    assert align_samples(1000 * vectors, 1000 * means).tolist() == pytest.approx(wanted, rel=1e-12)


# --- places in the answer ---


def test_places_count_from_the_first_open_token():
    opening = [1, 2, 3]
    assert [first_open(ids, opening) for ids in ([1, 2, 3, 7, 8], [1, 2, 9, 8], [1, 2], [5])] == [3, 2, 1, 0]
    labels = torch.full((3, 9), -100)
    labels[0, 2:7] = torch.tensor([1, 2, 3, 7, 12])  # 12 is a coordinate: behind all text rows
    labels[1, 5:9] = torch.tensor([1, 2, 9, 8])
    labels[2, 1:3] = torch.tensor([1, 2])
    rows = SupervisedRows.from_labels(labels, COLUMNS)
    places = answer_places(labels, rows, opening)
    by_target = list(zip(rows.targets_R.tolist(), places.tolist(), strict=True))
    assert by_target == [
        (1, -3), (2, -2), (3, -1), (7, 0), (1, -2), (2, -1), (9, 0), (8, 1), (1, -1), (2, 0), (12, 1)
    ]  # fmt: skip
    assert within(places, 1).sum() == 3
    assert within(places, 2).sum() == 5  # the third answer has no second open token
    assert within(places, None).all()


# --- the objective ---


def settings(*modules: dict[str, Any], **more: Any) -> LatentPrefixSettings:
    return LatentPrefixSettings.model_validate({"num_latents": 3, "objective": list(modules), **more})


ALL = (
    {"name": "stage1", "weight": 0.5},
    {"name": "latent_first_token_ce", "weight": [[0, 4.0], [10, 2.0]]},
    {"name": "latent_k_ce", "weight": 0.3, "config": {"num_tokens": 2}},
    {"name": "latent_kd", "weight": 0.7, "config": {"temperature": 2.0, "top_k": 4, "num_tokens": 2}},
    {"name": "latent_state_kd", "weight": 0.2, "config": {"layers": [1, 0], "num_tokens": 1}},
    {"name": "latent_align", "weight": 0.1},
)


def batch() -> tuple[Tensor, SupervisedRows, Tensor]:
    """Labels of two samples with padding, their rows and places (opening: token 1)."""
    labels = torch.full((2, 8), -100)
    labels[0, 2:7] = torch.tensor([1, 5, 12, 13, 6])
    labels[1, 3:5] = torch.tensor([1, 6])
    rows = SupervisedRows.from_labels(labels, COLUMNS)
    return labels, rows, answer_places(labels, rows, [1])


def ce_reference(row: list[float], target: int) -> float:
    return -math.log(softmax(row, 1.0)[target])


def test_the_loss_is_the_weighted_sum_of_means_over_the_step():
    _, rows, places = batch()
    objective = LatentObjective(settings(*ALL))
    logits, taught = randn(R, V, seed=1), randn(R, V, seed=2)
    states = {layer: (randn(R, H, seed=5 + layer), randn(R, H, seed=7 + layer)) for layer in (0, 1)}
    vectors, means = randn(2, 3, H, seed=3), randn(2, 3, H, seed=4)
    chosen_kd, chosen_state = (
        objective.rows_of("latent_kd", places),
        objective.rows_of("latent_state_kd", places),
    )
    weights = Stage1Weights(ce_weight=1.0)
    stage1 = stage1_terms(LossInputs.from_logits(logits, rows, COLUMNS, weights.needs()), weights)
    given = LatentInputs(
        rows.targets_R,
        places,
        logits,
        stage1,
        TeacherRows.of_logits(taught[chosen_kd], top_k=4, temperature=2.0),
        {layer: (s[chosen_state], t[chosen_state]) for layer, (s, t) in states.items()},
        vectors,
        means,
    )
    totals = {
        "text": 9.0,
        "coord": 6.0,
        "latent_first_token_ce": 4.0,
        "latent_k_ce": 11.0,
        "latent_kd": 8.0,
        "latent_state_kd": 10.0,
        "latent_align": 5.0,
    }
    loss, shares, raw = objective(given, objective.weights_at(5, "L"), totals)

    ce = [
        ce_reference(row, target)
        for row, target in zip(logits.tolist(), rows.targets_R.tolist(), strict=True)
    ]
    first = [r for r in range(R) if places[r] == 0]
    two = [r for r in range(R) if places[r] in (0, 1)]
    kd = sum(kd_reference(logits[r].tolist(), taught[r].tolist(), 2.0, 4) for r in two)
    state = sum(
        ((s[r] - t[r]) ** 2).sum().item() / (t[r] ** 2).sum().item()
        for s, t in states.values()
        for r in first
    )
    align = sum(
        ((v - m) ** 2).sum().item() / (m**2).sum().item() for v, m in zip(vectors, means, strict=True)
    )
    wanted = {
        "stage1": 0.5 * combine(stage1, 9.0, 6.0).item(),
        "latent_first_token_ce": 3.0 * sum(ce[r] for r in first) / 4,
        "latent_k_ce": 0.3 * sum(ce[r] for r in two) / 11,
        "latent_kd": 0.7 * kd / 8,
        "latent_state_kd": 0.2 * state / 10,
        "latent_align": 0.1 * align / 5,
    }
    assert (len(first), len(two)) == (2, 3)  # the second answer has one open token
    assert {name: share.item() for name, share in shares.items()} == pytest.approx(wanted, rel=1e-9)
    assert loss.item() == pytest.approx(sum(wanted.values()), rel=1e-9)
    counts = {name: term.count.item() for name, term in raw.items()}
    assert counts == objective.counts(places, 2)


def test_padding_and_prompt_carry_nothing():
    """Whatever the logits of unsupervised positions are, values and gradients are those of the supervised ones."""
    labels, rows, places = batch()
    objective = LatentObjective(settings(*ALL[1:3]))
    logits_BTV = randn(2, 8, V, seed=1).requires_grad_()

    def loss() -> Tensor:
        given = LatentInputs(rows.targets_R, places, logits_BTV.flatten(0, 1)[rows.positions_R])
        return objective(given, objective.settled("L"), objective.counts(places, 2))[0]

    before = loss()
    before.backward()
    assert logits_BTV.grad is not None
    supervised = torch.zeros(2, 8, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != -100
    assert not logits_BTV.grad[~supervised].any()
    with torch.no_grad():
        logits_BTV[~supervised] += 100
    assert torch.equal(loss(), before)


def test_modules_act_in_their_kind_of_step():
    objective = LatentObjective(
        settings(
            {"name": "stage1", "weight": 1.0, "steps": ["T", "L"]},
            {"name": "latent_kd", "weight": [[0, 0.0], [4, 1.0]]},
            {"name": "latent_align", "weight": 1.0, "steps": ["T"]},
            {"name": "latent_k_ce", "weight": 1.0, "enabled": False, "config": {"num_tokens": 2}},
            text_share=0.5,
            language_model="tuned",
        )
    )
    assert objective.weights_at(0, "T") == {"stage1": 1, "latent_align": 1}
    assert objective.weights_at(0, "L") == {"stage1": 1}
    assert objective.weights_at(2, "L") == {"stage1": 1, "latent_kd": 0.5}
    assert objective.settled("L") == {"stage1": 1, "latent_kd": 1}
    with pytest.raises(ContractError, match="needs teacher"):
        objective(
            LatentInputs(torch.zeros(1), torch.zeros(1), torch.zeros(1, V)),
            {"latent_kd": 1.0},
            {"latent_kd": 1.0},
        )


# --- what the section refuses ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": [{**ALL[1], "weight": [[0, 1.0], [9, 12.0]]}]}, "latent_first_token_ce: its weight reaches 12"),
        ({"objective": [ALL[2], ALL[2]]}, "lists module latent_k_ce twice"),
        ({"objective": [{"name": "latent_k_ce", "weight": 1.0, "config": {"num_tokens": 2, "k": 3}}]}, "Extra inputs"),
        ({"objective": [ALL[0]], "source": "static", "encoder": {"width": 64}}, "encoder has no effect"),
        ({"objective": [ALL[0]], "text_share": 1.0}, "text_share is 1 throughout"),
        ({"objective": [ALL[0]], "text_share": 0.5}, "no module of the objective acts in steps of kind T"),
        ({"objective": [{**ALL[0], "steps": ["T", "L"]}], "text_share": 0.5}, "stage1 cannot act in steps of kind T"),
        ({"objective": [ALL[0], {**ALL[5], "steps": ["T"]}]}, "latent_align acts in steps of kind T"),
        ({"objective": [{**ALL[0], "weight": 0.0}]}, "no module of the objective acts in steps of kind L"),
        ({"objective": [ALL[0]], "keep": {"evaluate": "full"}}, "evaluate: full cannot take effect"),
        ({"objective": [ALL[0]], "keep": {"prob": 0.0}}, "above 0"),
        ({"objective": [ALL[0]], "encoder": {"width": 100, "heads": 8}}, "no multiple of 16"),
    ],
)  # fmt: skip
def test_settings_that_cannot_take_effect_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LatentPrefixSettings.model_validate({"num_latents": 4, **given})
