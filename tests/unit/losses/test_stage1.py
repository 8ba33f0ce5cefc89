"""The stage-1 objective against a float64 loop over tokens, and its rules for counts and keys."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp.errors import ConfigError, ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_loss, stage1_terms

K, V, START = 1000, 1060, 40
IDS = list(range(START, START + K))
DEFAULTS = {
    "soft_ce_weight": 1.0,
    "w1_weight": 1.0,
    "ce_weight": 0.0,
    "gate_weight": 0.0,
    "temperature": 1.0,
    "target_sigma": 2.0,
    "target_truncate": None,
}
MIX = {"ce_weight": 1.0, "gate_weight": 1.0}
KEYS_WITHOUT_MASS = {
    "base_ce/loss",
    "base_ce/noncoord_tokens",
    *(
        f"coord_diag/{name}"
        for name in [
            "enabled",
            "loss",
            "soft_ce",
            "w1",
            "ce",
            "coord_tokens",
            "acc_top5",
            "p_gt_mean",
            "margin_mean",
            "expected_bin_mae",
            "expected_bin_abs_err_p90",
            "w1_to_delta",
        ]
    ),
    *(f"coord_softce_w1/{name}" for name in ["loss", "soft_ce", "w1", "ce"]),
}
MASS_KEYS = {"coord_diag/gate", "coord_diag/coord_vocab_mass", "coord_softce_w1/gate"}


def make_batch(seed=0, batch=2, length=9, scale=3.0, vocab=V):
    """Logits, and labels with a prompt, text, coordinates (bins 0 and 999 among them) and ragged ends."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=g) * scale
    labels = torch.randint(0, START, (batch, length), generator=g)
    coord = torch.rand(batch, length, generator=g) < 0.4
    labels[coord] = torch.randint(START, START + K, (int(coord.sum()),), generator=g)
    labels[:, 3], labels[:, 4] = START, START + K - 1
    labels[:, :2] = -100
    labels[0, -2:] = -100
    return logits, labels


def reference(logits_BTV, labels_BT, settings):
    """Loss and numbers in float64, token by token."""
    w = DEFAULTS | settings
    T = w["temperature"]
    rows = {"text": [], "all": [], "soft_ce": [], "w1": [], "ce": [], "gate": [], "weighted": []}
    k = torch.arange(K, dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_BTV.double(), labels_BT, strict=True):
        for t in range(len(labels_T) - 1):
            target = int(labels_T[t + 1])
            if target == -100:
                continue
            z = logits_TV[t]
            rows["all"].append(z.logsumexp(0) - z[target])
            if target not in IDS:
                rows["text"].append(rows["all"][-1])
                continue
            g = target - START
            q = torch.exp(-((k - g) ** 2) / (2 * w["target_sigma"] ** 2))
            if w["target_truncate"] is not None:
                q[(k - g).abs() > w["target_truncate"]] = 0
            q = q / q.sum()
            c = z[START : START + K]
            p = (c / T).softmax(0)
            rows["soft_ce"].append(-(q * (c / T).log_softmax(0)).sum())
            rows["w1"].append((p.cumsum(0) - q.cumsum(0)).abs().sum() / (K - 1))
            rows["ce"].append(-c.log_softmax(0)[g])
            rows["gate"].append((z / T).logsumexp(0) - (c / T).logsumexp(0))
            rows["weighted"].append(
                sum(w[f"{name}_weight"] * rows[name][-1] for name in ("soft_ce", "w1", "ce", "gate"))
            )
    means = {
        name: torch.stack(values).mean() if values else torch.tensor(0.0) for name, values in rows.items()
    }
    loss = means["all"] if settings.get("enabled") is False else means["text"] + means["weighted"]
    return loss, means


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        MIX,
        MIX | {"temperature": 0.5, "target_truncate": 8},
        MIX | {"temperature": 2.0, "target_truncate": 0, "target_sigma": 5.0, "w1_weight": 3.0},
        {"soft_ce_weight": 0.0, "w1_weight": 0.0, "ce_weight": 1.0},
        {"soft_ce_weight": 0.0, "w1_weight": 2.0},
        {"enabled": False},
        {"enabled": False, "gate_weight": 1.0, "temperature": 2.0},
    ],
)
def test_loss_gradient_and_numbers_match_float64(settings, dtype):
    logits, labels = make_batch()
    ours_in = logits.to(dtype).requires_grad_()
    ref_in = ours_in.detach().double().requires_grad_()

    loss, numbers = stage1_loss(ours_in, labels, IDS, settings)
    expected, means = reference(ref_in, labels, settings)
    loss.backward()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        ours_in.grad.double(), ref_in.grad, rtol=rtol, atol=2e-6 * ref_in.grad.abs().max().item()
    )
    assert numbers["base_ce/loss"] == pytest.approx(means["text"].item(), rel=1e-5)
    assert numbers["coord_diag/loss"] == pytest.approx(means["weighted"].item(), rel=1e-5)
    for name in {"soft_ce", "w1", "ce", "gate"} & {key.split("/")[1] for key in numbers}:
        assert numbers[f"coord_diag/{name}"] == pytest.approx(means[name].item(), rel=1e-5)
        assert numbers[f"coord_softce_w1/{name}"] == numbers[f"coord_diag/{name}"]
    shifted = labels[:, 1:]
    num_coord = int((shifted >= START).sum())
    assert numbers["coord_diag/coord_tokens"] == num_coord
    assert numbers["base_ce/noncoord_tokens"] == int((shifted != -100).sum()) - num_coord
    assert numbers["coord_diag/enabled"] == float(settings.get("enabled", True))


@pytest.mark.parametrize("fill", [1e4, -1e4])
def test_extreme_logits_stay_finite(fill):
    logits, labels = make_batch()
    logits = torch.where(logits > 0, fill, -fill).requires_grad_()
    loss, numbers = stage1_loss(logits, labels, IDS, MIX)
    expected, _ = reference(logits.detach(), labels, MIX)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.isfinite(logits.grad).all()
    assert all(math.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("form", [tuple, torch.tensor, CoordColumns], ids=lambda form: form.__name__)
def test_ids_in_any_form_and_any_place(form):
    """Scattering the coordinate tokens over the vocabulary changes nothing."""
    logits, labels = make_batch()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(5))
    place = torch.argsort(order)
    moved = torch.where(labels == -100, -100, place[labels.clamp_min(0)])

    loss, numbers = stage1_loss(logits, labels, IDS, MIX)
    moved_loss, moved_numbers = stage1_loss(logits[..., order], moved, form(place[IDS].tolist()), MIX)

    torch.testing.assert_close(moved_loss, loss)
    assert moved_numbers == pytest.approx(numbers, rel=1e-5)


# --- which keys there are ------------------------------------------------------------------------------


def test_keys_with_and_without_the_full_vocabulary_sum():
    batch = make_batch()
    assert set(stage1_loss(*batch, IDS, {})[1]) == KEYS_WITHOUT_MASS
    assert set(stage1_loss(*batch, IDS, {"enabled": False})[1]) == KEYS_WITHOUT_MASS
    assert set(stage1_loss(*batch, IDS, {"gate_weight": 0.5})[1]) == KEYS_WITHOUT_MASS | MASS_KEYS
    assert set(stage1_loss(*batch, IDS, {}, mass_monitor=True)[1]) == KEYS_WITHOUT_MASS | MASS_KEYS


def test_mass_is_exp_of_minus_gate():
    logits, labels = make_batch(batch=1, length=5)
    labels[0] = torch.tensor([-100, -100, -100, START + 7, -100])  # one coordinate row
    numbers = stage1_loss(logits, labels, IDS, MIX)[1]
    assert numbers["coord_diag/coord_vocab_mass"] == pytest.approx(math.exp(-numbers["coord_diag/gate"]))


def test_no_coordinate_row_no_coordinate_term_or_key():
    logits, labels = make_batch()
    labels[labels >= START] = 3
    loss, numbers = stage1_loss(logits, labels, IDS, MIX)
    assert set(numbers) == {"base_ce/loss", "base_ce/noncoord_tokens"}
    assert loss.item() == pytest.approx(numbers["base_ce/loss"])


def test_only_coordinate_rows():
    logits, labels = make_batch()
    labels[labels < START] = -100
    loss, numbers = stage1_loss(logits, labels, IDS, MIX)
    assert numbers["base_ce/noncoord_tokens"] == 0
    assert "base_ce/loss" not in numbers
    assert loss.item() == pytest.approx(numbers["coord_diag/loss"])


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_supervised_gives_zero_loss_and_zero_gradient(enabled):
    logits = torch.randn(2, 5, V, requires_grad=True)
    loss, numbers = stage1_loss(logits, torch.full((2, 5), -100), IDS, {"enabled": enabled})
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
    assert numbers == {"base_ce/noncoord_tokens": 0}


# --- the path of the trainer ---------------------------------------------------------------------------


def terms_of(logits_BTV, labels_BT, weights):
    columns = CoordColumns(IDS)
    rows = SupervisedRows.from_labels(labels_BT, columns)
    logits_RV = logits_BTV.flatten(0, 1)[rows.positions_R]
    return stage1_terms(LossInputs.from_logits(logits_RV, rows, columns, weights.needs()), weights)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_step_gradient_does_not_depend_on_how_the_step_is_cut(micro_batch, enabled):
    """8 ragged samples at once, and in micro-batches that divide by the counts of all 8."""
    weights = Stage1Weights(ce_weight=1.0, gate_weight=1.0, enabled=enabled)
    logits, labels = make_batch(batch=8, length=7)
    labels[5] = -100  # a sample without supervision
    labels[6][labels[6] >= START] = 2  # one without coordinates
    columns = CoordColumns(IDS)
    whole = SupervisedRows.from_labels(labels, columns)

    def step_gradient(size, dtype):
        z = logits.to(dtype).requires_grad_()
        losses = []
        for start in range(0, 8, size):
            terms = terms_of(z[start : start + size], labels[start : start + size], weights)
            loss = combine(terms, torch.tensor(float(whole.num_text)), torch.tensor(float(whole.num_coord)))
            loss.backward()
            losses.append(loss.item())
        return sum(losses), z.grad

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        loss, grad = step_gradient(8, dtype)
        cut_loss, cut_grad = step_gradient(micro_batch, dtype)
        assert cut_loss == pytest.approx(loss, rel=1e-6)
        assert (cut_grad - grad).norm() <= tolerance * grad.norm()


def test_merged_chunks_log_the_numbers_of_the_whole():
    weights = Stage1Weights(ce_weight=1.0, gate_weight=1.0)
    logits, labels = make_batch(batch=4)
    whole = terms_of(logits, labels, weights)
    merged = Stage1Terms.merge([terms_of(logits[i : i + 1], labels[i : i + 1], weights) for i in range(4)])
    means = {key: value.mean().item() for key, value in whole.metrics().items()}
    assert {key: value.mean().item() for key, value in merged.metrics().items()} == pytest.approx(
        means, rel=1e-5
    )


def test_counts_may_be_numbers_or_tensors():
    terms = terms_of(*make_batch(), Stage1Weights())
    as_numbers, as_tensors = combine(terms, 12, 5), combine(terms, torch.tensor(12.0), torch.tensor(5.0))
    torch.testing.assert_close(as_numbers, as_tensors)
    torch.testing.assert_close(as_numbers, terms.text.sum / 12 + terms.coord.sum / 5)


def test_rows_are_sorted_text_first_and_point_at_the_previous_token():
    columns = CoordColumns([10, 11, 12])
    labels = torch.tensor([[-100, 3, 11, 4], [-100, -100, 12, -100]])
    rows = SupervisedRows.from_labels(labels, columns)
    assert rows.num_text == 2
    assert rows.positions_R.tolist() == [0, 2, 1, 5]
    assert rows.targets_R.tolist() == [3, 4, 11, 12]
    assert rows.bins_N.tolist() == [1, 2]


def test_the_hot_path_never_reads_a_value_from_the_device():
    """Meta tensors have no values: anything that waits for the device would raise on them."""
    weights = Stage1Weights(ce_weight=1.0, gate_weight=1.0, target_truncate=8)
    rows = SupervisedRows(
        positions_R=torch.empty(7, dtype=torch.int64, device="meta"),
        targets_R=torch.empty(7, dtype=torch.int64, device="meta"),
        num_text=4,
        bins_N=torch.empty(3, dtype=torch.int64, device="meta"),
    )
    logits_RV = torch.empty(7, V, device="meta", requires_grad=True)
    for settings in (weights, Stage1Weights(enabled=False)):
        inputs = LossInputs.from_logits(logits_RV, rows, CoordColumns(IDS), settings.needs(mass_monitor=True))
        terms = stage1_terms(inputs, settings)
        count = torch.empty((), device="meta")
        combine(terms, count, count).backward()
        assert terms.metrics().keys() == KEYS_WITHOUT_MASS | MASS_KEYS


def test_ablation_needs_inputs_that_hold_the_full_cross_entropy():
    logits, labels = make_batch()
    columns = CoordColumns(IDS)
    rows = SupervisedRows.from_labels(labels, columns)
    inputs = LossInputs.from_logits(logits.flatten(0, 1)[rows.positions_R], rows, columns, LossNeeds())
    with pytest.raises(ContractError, match="needs"):
        combine(stage1_terms(inputs, Stage1Weights(enabled=False)), 1, 1)


# --- settings ------------------------------------------------------------------------------------------


def test_defaults():
    assert Stage1Weights.from_mapping({}) == Stage1Weights(**DEFAULTS, enabled=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"soft_ce_wieght": 1.0}, r"soft_ce_wieght in weights: unknown key; did you mean .*soft_ce_weight"),
        ({"w1_weight": -1}, r"w1_weight = -1 in weights: expected greater than or equal to 0"),
        ({"gate_weight": "1"}, r'gate_weight = "1" in weights: expected a valid number'),
        ({"ce_weight": True}, r"ce_weight = true in weights: expected a valid number"),
        ({"temperature": 0}, r"temperature = 0 in weights: expected greater than 0"),
        (
            {"target_sigma": float("nan")},
            r"target_sigma = NaN in weights: expected a number above 0, or points",
        ),
        ({"target_truncate": -2}, r"target_truncate = -2 in weights: expected greater than or equal to 0"),
        ({"enabled": "yes"}, r'enabled = "yes" in weights: expected a valid boolean'),
        ([("w1_weight", 1)], r"in weights: expected a mapping"),
    ],
)
def test_settings_are_strict(settings, message):
    with pytest.raises(ConfigError, match=r"custom\.coord_soft_ce_w1.*" + message):
        Stage1Weights.from_mapping(settings)
    with pytest.raises(ConfigError):
        stage1_loss(*make_batch(), IDS, settings)


def test_without_coordinate_columns_it_is_the_cross_entropy_of_every_row():
    """Answers that write numbers: all targets are text, and no coordinate key is logged."""
    logits, labels = make_batch()
    loss, numbers = stage1_loss(logits, labels, (), {"enabled": False})
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    num_rows = int((labels[:, 1:] != -100).sum())
    assert numbers == {
        "base_ce/loss": pytest.approx(expected.item(), rel=1e-6),
        "base_ce/noncoord_tokens": num_rows,
    }
