"""The stage-1 objective: text cross-entropy plus distribution losses on coordinate slots.

    loss = sum(text CE) / text_count + sum(coord loss) / coord_count
    coord loss = soft_ce_weight * soft_ce + w1_weight * w1 + ce_weight * ce + gate_weight * gate

with both counts taken over the whole optimizer step (accumulation and ranks). With `enabled: false`
(pure-CE ablation) the loss is the ordinary cross-entropy over all supervised rows, and the coordinate
numbers are computed all the same, as diagnostics.

A trainer does, per forward:

    rows = SupervisedRows.from_labels(labels_BT, columns)            # when the step is planned
    inputs = LossInputs.from_logits(logits_RV, rows, columns, weights.needs())
    terms = stage1_terms(inputs, weights)
    loss = combine(terms, text_count, coord_count)                   # counts of the whole step
    for key, (total, count) in terms.metrics().items(): ...          # still on the device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coordexp.config import parse_sections
from coordexp.control.points import Number, Points, last_value, value_at
from coordexp.errors import ContractError
from coordexp.losses import coord as atoms
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows
from coordexp.losses.sums import SumCount, add_up, divide, sum_count
from coordexp.metrics import keys_stage1 as keys
from coordexp.metrics.keys_run import GRADIENT_COORD_CE

SECTION = "coord_soft_ce_w1"
"""The settings' name, in front of those of weights."""
COORD_TERMS = ("soft_ce", "w1", "ce", "gate")
TERM_KEYS = {
    "soft_ce": keys.COORD_DIAG_SOFT_CE,
    "w1": keys.COORD_DIAG_W1,
    "ce": keys.COORD_DIAG_CE,
    "gate": keys.COORD_DIAG_GATE,
}
MONITOR_KEYS = {
    "acc_top5": keys.COORD_DIAG_ACC_TOP5,
    "p_gt_mean": keys.COORD_DIAG_P_GT_MEAN,
    "margin_mean": keys.COORD_DIAG_MARGIN_MEAN,
    "expected_bin_mae": keys.COORD_DIAG_EXPECTED_BIN_MAE,
    "w1_to_delta": keys.COORD_DIAG_W1_TO_DELTA,
    "coord_vocab_mass": keys.COORD_DIAG_COORD_VOCAB_MASS,
}
"""Names of `losses.coord.monitor_rows` -> metric keys."""


@dataclass(frozen=True)
class Stage1Weights:
    """`custom.coord_soft_ce_w1`: weights of the coordinate terms and the shape of the soft target."""

    enabled: bool = True
    """False: pure-CE ablation."""
    soft_ce_weight: float = 1.0
    w1_weight: float = 1.0
    ce_weight: float = 0.0
    gate_weight: float = 0.0
    temperature: float = 1.0
    target_sigma: Number = 2.0
    """In bins."""
    target_sigma_per_side: Number | None = None
    """Sigma over the side of a box, where that is more than target_sigma; None: target_sigma everywhere."""
    target_truncate: float | None = None
    """Bins beyond which there is no target mass; None: no cut."""
    warmup: Mapping[str, Points] = field(default_factory=dict)
    """Factors on weights, by their names."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Stage1Weights:
        """From plain values, left out ones at their defaults; `monitor_mass` is no weight and may be among them.

        Raises ConfigError for what the settings section does not take, with the dotted path.
        """
        custom = parse_sections({"custom": {"coord_soft_ce_w1": mapping}}, source="weights").custom
        return cls(**custom.coord_soft_ce_w1.model_dump(exclude={"monitor_mass"}))

    def at(self, step: int, knobs: Mapping[str, float] | None = None) -> Stage1Weights:
        """What optimizer step `step` trains with: numbers in place of points.

        knobs: weights that a controller has in force in place of the configured ones: `coord_soft_ce_w1.w1_weight`.
        """
        return self._with(partial(value_at, step), knobs or {})

    def in_force(self, step: int, knobs: Mapping[str, float] | None = None) -> dict[str, float]:
        """Value at a step of every setting that can change over the run, by its name."""
        of_step = self.at(step, knobs)
        points = ("target_sigma", "target_sigma_per_side")
        names = [*self.warmup, *(name for name in points if isinstance(getattr(self, name), Sequence))]
        names += [name for name in self.weights() if f"{SECTION}.{name}" in (knobs or {})]
        return {name: getattr(of_step, name) for name in dict.fromkeys(names)}

    def weights(self) -> dict[str, float]:
        """The weights by name."""
        return {f"{term}_weight": self.of(term) for term in COORD_TERMS}

    def settled(self) -> Stage1Weights:
        """What evaluation measures with at any step, so that its losses can be compared: the last point of points."""
        return self._with(last_value, {})

    def _with(self, number_of: Callable[[Number], float], knobs: Mapping[str, float]) -> Stage1Weights:
        per_side = self.target_sigma_per_side
        weights: dict[str, Any] = {
            name: knobs.get(f"{SECTION}.{name}", weight) * number_of(self.warmup.get(name, 1.0))
            for name, weight in self.weights().items()
        }
        return replace(
            self,
            **weights,
            warmup={},
            target_sigma=number_of(self.target_sigma),
            target_sigma_per_side=None if per_side is None else number_of(per_side),
        )

    def of(self, term: str) -> float:
        """Weight of one of COORD_TERMS."""
        return float(getattr(self, f"{term}_weight"))

    def needs(self, *, mass_monitor: bool = False) -> LossNeeds:
        """What `stage1_terms` looks at. `mass_monitor`: gate and coord_vocab_mass even at gate_weight 0."""
        return LossNeeds(
            temperature=self.temperature,
            coord_odds=self.gate_weight > 0 or mass_monitor,
            coord_ce=not self.enabled,
        )


@dataclass(frozen=True)
class Stage1Terms:
    """Sums and counts of one forward or chunk. `text`, `coord` and `coord_ce` carry the gradient."""

    enabled: bool
    num_text: int
    """Number of text rows, known on the host."""
    text: SumCount
    """Cross-entropy of the rows whose target is no coordinate token."""
    coord: SumCount
    """Weighted coordinate loss; detached in the pure-CE ablation."""
    coord_ce: SumCount | None
    """Full-vocabulary cross-entropy of coordinate rows (pure-CE ablation only)."""
    raw: dict[str, SumCount]
    """The unweighted COORD_TERMS, detached; `gate` only where it was computed."""
    monitors: dict[str, SumCount]
    """Distribution monitors by the names of `coord_monitors`, detached."""
    abs_err_N: Tensor
    """|E_p k - g| in bins of every coordinate row, detached."""
    by_part: dict[str, SumCount] = field(default_factory=dict)
    """`text`, `coord` and `coord_ce` of every data set of a mixture, as vectors [P], detached; empty without one."""

    def detach(self) -> Stage1Terms:
        """The same numbers outside the graph."""
        coord_ce = None if self.coord_ce is None else self.coord_ce.detach()
        return replace(self, text=self.text.detach(), coord=self.coord.detach(), coord_ce=coord_ce)

    @classmethod
    def merge(cls, parts: Sequence[Stage1Terms]) -> Stage1Terms:
        """The terms of several chunks as one. Needs at least one."""
        ce_parts = [part.coord_ce for part in parts if part.coord_ce is not None]
        return cls(
            enabled=parts[0].enabled,
            num_text=sum(part.num_text for part in parts),
            text=add_up(part.text for part in parts),
            coord=add_up(part.coord for part in parts),
            coord_ce=add_up(ce_parts) if ce_parts else None,
            raw={name: add_up(part.raw[name] for part in parts) for name in parts[0].raw},
            monitors={name: add_up(part.monitors[name] for part in parts) for name in parts[0].monitors},
            abs_err_N=torch.cat([part.abs_err_N for part in parts]),
            by_part={name: add_up(part.by_part[name] for part in parts) for name in parts[0].by_part},
        )

    def metrics(self) -> dict[str, SumCount]:
        """What is logged, by full key. No text rows: no `base_ce/loss`; no coordinate rows: no coord key.

        `base_ce/loss` is the text part, also in the ablation; `coord_diag/loss` is the weighted
        coordinate loss, in the training loss only where `coord_diag/enabled` is 1.
        """
        ones = torch.ones_like(self.text.count)
        text, num_coord = self.text.detach(), self.abs_err_N.numel()
        metrics = {keys.BASE_CE_NONCOORD_TOKENS: SumCount(text.count, ones)}
        if self.num_text:
            metrics[keys.BASE_CE_LOSS] = text
        if num_coord == 0:
            return metrics
        losses = {keys.COORD_DIAG_LOSS: self.coord.detach()}
        losses |= {TERM_KEYS[name]: term for name, term in self.raw.items()}
        metrics |= losses
        metrics |= {MONITOR_KEYS[name]: monitor for name, monitor in self.monitors.items()}
        metrics |= {keys.COORD_SOFTCE_W1_ALIASES[key]: value for key, value in losses.items()}
        metrics[keys.COORD_DIAG_ENABLED] = SumCount(ones * float(self.enabled), ones)
        metrics[keys.COORD_DIAG_COORD_TOKENS] = SumCount(self.coord.count, ones)
        metrics[keys.COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90] = SumCount(atoms.p90(self.abs_err_N), ones)
        return metrics


def stage1_terms(inputs: LossInputs, weights: Stage1Weights) -> Stage1Terms:
    """All terms of the stage-1 objective. `inputs` must hold what `weights.needs()` names. No host sync.

    weights: of one step (`Stage1Weights.at`); points count as their last one.
    """
    if inputs.coord_logits_NK.shape[-1] == 0:
        return _terms_of_text(inputs, weights)
    raw_rows = _coord_term_rows(inputs, weights)
    coord_N = torch.zeros_like(inputs.coord_logits_NK[:, 0])
    for name, values_N in raw_rows.items():
        coord_N = coord_N + weights.of(name) * values_N
    monitor_rows = atoms.monitor_rows(inputs.distribution, inputs.rows.bins_N, inputs.coord_log_odds_N)
    return Stage1Terms(
        enabled=weights.enabled,
        num_text=inputs.rows.num_text,
        text=sum_count(inputs.text_ce_R),
        coord=sum_count(coord_N),
        coord_ce=None if inputs.coord_ce_N is None else sum_count(inputs.coord_ce_N),
        raw={name: sum_count(values_N.detach()) for name, values_N in raw_rows.items()},
        monitors={name: sum_count(values_N) for name, values_N in monitor_rows.items()},
        abs_err_N=monitor_rows["expected_bin_mae"],
        by_part=_by_part(inputs, coord_N),
    )


def _terms_of_text(inputs: LossInputs, weights: Stage1Weights) -> Stage1Terms:
    """Where answers write numbers and there are no coordinate columns: every row is text."""
    nothing_N = inputs.coord_logits_NK.sum(-1)
    return Stage1Terms(
        enabled=weights.enabled,
        num_text=inputs.rows.num_text,
        text=sum_count(inputs.text_ce_R),
        coord=sum_count(nothing_N),
        coord_ce=None if inputs.coord_ce_N is None else sum_count(inputs.coord_ce_N),
        raw={},
        monitors={},
        abs_err_N=nothing_N.detach(),
        by_part=_by_part(inputs, nothing_N),
    )


def _by_part(inputs: LossInputs, coord_N: Tensor) -> dict[str, SumCount]:
    rows = inputs.rows
    if rows.parts_R is None:
        return {}
    text, coord = rows.parts_R[: rows.num_text], rows.parts_R[rows.num_text :]
    found = {
        "text": _sum_by(inputs.text_ce_R, text, rows.num_parts),
        "coord": _sum_by(coord_N, coord, rows.num_parts),
    }
    if inputs.coord_ce_N is not None:
        found["coord_ce"] = _sum_by(inputs.coord_ce_N, coord, rows.num_parts)
    return found


def _sum_by(values_R: Tensor, parts_R: Tensor, num_parts: int) -> SumCount:
    """Sums [P] and counts [P] of the values whose part is 0, 1, ... No host sync."""
    members_PR = parts_R == torch.arange(num_parts, device=parts_R.device)[:, None]
    members_PR = members_PR.to(values_R.dtype)
    return SumCount((members_PR * values_R.detach()).sum(-1), members_PR.sum(-1))


def combine(terms: Stage1Terms, text_count: Tensor | float, coord_count: Tensor | float) -> Tensor:
    """The loss of this forward, normalised by counts of the whole optimizer step (numbers or tensors).

    Summed over the forwards of all ranks it is the loss of the step. A count of 0 drops its term.
    """
    if terms.enabled:
        return divide(terms.text.sum, text_count) + divide(terms.coord.sum, coord_count)
    if terms.coord_ce is None:
        raise ContractError(
            "the pure-CE ablation needs LossInputs made with Stage1Weights.needs() (coord_ce)"
        )
    return divide(terms.text.sum + terms.coord_ce.sum, text_count + coord_count)


def atom_names(weights: Stage1Weights) -> list[str]:
    """Keys of the terms that the loss is made of, those of the metrics behind them."""
    if not weights.enabled:
        return [keys.BASE_CE_LOSS, GRADIENT_COORD_CE]
    return [keys.BASE_CE_LOSS, *(key for name, key in TERM_KEYS.items() if weights.of(name) > 0)]


def atom_losses(
    inputs: LossInputs, weights: Stage1Weights, text_count: Tensor | float, coord_count: Tensor | float
) -> dict[str, Tensor]:
    """What each term of `atom_names` adds to the loss of `combine`, 0-dim, with its graph."""
    if not weights.enabled:
        if inputs.coord_ce_N is None:
            raise ContractError(
                "LossInputs.coord_ce_N is missing: make the inputs with Stage1Weights.needs()"
            )
        losses = {keys.BASE_CE_LOSS: inputs.text_ce_R, GRADIENT_COORD_CE: inputs.coord_ce_N}
        return {key: divide(values.sum(), text_count + coord_count) for key, values in losses.items()}
    losses = {keys.BASE_CE_LOSS: divide(inputs.text_ce_R.sum(), text_count)}
    if inputs.coord_logits_NK.shape[-1] == 0:
        return losses
    for name, values_N in _coord_term_rows(inputs, weights).items():
        if weights.of(name) > 0:
            losses[TERM_KEYS[name]] = divide(weights.of(name) * values_N.sum(), coord_count)
    return losses


def stage1_loss(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    coord_ids: CoordColumns | Sequence[int] | Tensor,
    weights: Mapping[str, Any] | Stage1Weights,
    *,
    mass_monitor: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The stage-1 loss of one batch on its own, and its numbers as floats under their logged names.

    A convenience for scripts and checks: it waits for the device to read the numbers. Trainers use
    `stage1_terms` and `combine`, with counts of the whole optimizer step.

    Arguments:
        logits_BTV: float [B, T, V]; row t predicts token t + 1.
        labels_BT: int64 [B, T], unshifted, -100 where not supervised.
        coord_ids: the K coordinate ids in bin order.
        weights: names of Stage1Weights, the ones left out take their defaults.
        mass_monitor: report `gate` and `coord_vocab_mass` also where gate_weight is 0.
    Returns the loss (0-dim, with gradient) and its numbers; with `enabled: false` the loss is the mean
    cross-entropy over all supervised rows and the `coord_diag/*` numbers are diagnostics only.
    """
    if not isinstance(weights, Stage1Weights):
        weights = Stage1Weights.from_mapping(weights)
    columns = CoordColumns.of(coord_ids)
    rows = SupervisedRows.from_labels(labels_BT, columns)
    logits_RV = logits_BTV.flatten(0, 1)[rows.positions_R]
    inputs = LossInputs.from_logits(logits_RV, rows, columns, weights.needs(mass_monitor=mass_monitor))
    terms = stage1_terms(inputs, weights)
    loss = combine(terms, terms.text.count, terms.coord.count)
    return loss, {key: value.mean().item() for key, value in terms.metrics().items()}


def _coord_term_rows(inputs: LossInputs, weights: Stage1Weights) -> dict[str, Tensor]:
    """Unweighted COORD_TERMS per coordinate row; only those that the loss contains carry a gradient."""
    dist, bins_N, log_odds_N = inputs.distribution, inputs.rows.bins_N, inputs.coord_log_odds_N
    per_side = weights.target_sigma_per_side
    sigma = atoms.sigma_rows(
        last_value(weights.target_sigma),
        None if per_side is None else last_value(per_side),
        inputs.rows.sides_N,
    )
    target_NK = atoms.gaussian_targets(
        bins_N,
        dist.num_bins,
        sigma,
        weights.target_truncate,
        dtype=inputs.coord_logits_NK.dtype,
    )
    rows = {
        "soft_ce": atoms.soft_ce_rows(dist, target_NK),
        "w1": atoms.w1_rows(dist, target_NK),
        "ce": atoms.token_ce_rows(dist, bins_N),
    }
    if log_odds_N is not None:
        rows["gate"] = atoms.gate_rows(log_odds_N)
    return {
        name: values_N if weights.enabled and weights.of(name) > 0 else values_N.detach()
        for name, values_N in rows.items()
    }
