"""The stage-2 objective: module lists -> weighted atoms under their provenance keys.

Every atom is logged as `loss/<provenance>/<atom>` after all weights, so that the atoms of a step sum to
its loss. `ForwardKind` says which provenances a forward yields. A trainer does, per optimizer step:

    counts = sum over packs and ranks of objective.counts(rows, forward)     # before the first forward
    loss, terms = objective(inputs, forward, counts)                         # per forward
    for key, (total, count) in terms.metrics().items(): ...                  # still on the device
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from coordexp.control.points import last_value
from coordexp.errors import ContractError
from coordexp.losses import box
from coordexp.losses import coord as atoms
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows, TextRole
from coordexp.losses.modules import (
    CHANNELS,
    BboxGeo,
    CoordReg,
    ForwardKind,
    ObjectiveSpec,
    TextWeighting,
    TokenCE,
)
from coordexp.losses.sums import SumCount, add_up, divide, sum_count
from coordexp.metrics.keys_stage2 import coord_diagnostic, loss_atom

Counts = Mapping[str, Tensor | float]
Config = TypeVar("Config", TokenCE, BboxGeo, CoordReg)


@dataclass(frozen=True)
class Stage2Terms:
    """Sums and counts of one forward or chunk, detached."""

    atoms: dict[str, SumCount]
    """`loss/<provenance>/<atom>`: weighted sum, and this forward's share of the atom's denominator."""
    monitors: dict[str, SumCount]
    """`coord_diag/<provenance>/<name>`."""
    abs_err_key: str | None
    """Key of the 90th percentile of `abs_err_N`; None without coord_diag."""
    abs_err_N: Tensor
    """|E_p k - g| in bins of every coordinate row."""

    @classmethod
    def merge(cls, parts: Sequence[Stage2Terms]) -> Stage2Terms:
        """The terms of several chunks of one forward as one. Needs at least one."""
        first = parts[0]
        return cls(
            atoms={key: add_up(part.atoms[key] for part in parts) for key in first.atoms},
            monitors={key: add_up(part.monitors[key] for part in parts) for key in first.monitors},
            abs_err_key=first.abs_err_key,
            abs_err_N=torch.cat([part.abs_err_N for part in parts]),
        )

    def metrics(self) -> dict[str, SumCount]:
        """What is logged, by full key. Without coordinate rows there is no `coord_diag/*` key."""
        if self.abs_err_key is None or self.abs_err_N.numel() == 0:
            return dict(self.atoms)
        p90 = atoms.p90(self.abs_err_N)
        return self.atoms | self.monitors | {self.abs_err_key: SumCount(p90, torch.ones_like(p90))}


class Stage2Objective:
    """Weighted sum of loss atoms, as declared by the module lists.

    All coordinate atoms, box decoding and coord_diag look at one distribution per slot, at the temperature
    of coord_reg (1 without coord_reg).

    Arguments:
        spec: the module lists.
        decode_mode: how bbox_geo reads a coordinate off its distribution, `exp` or `st`.
        configured: the objective of the whole run, where this is that of one step; a module whose weight is 0 at the
            step still says the temperature, and on which rows the text gate acts.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        decode_mode: Literal["exp", "st"] = "exp",
        *,
        configured: Stage2Objective | None = None,
    ):
        self.spec = spec
        self.decode_mode = decode_mode
        token_ce, self._text_scale = self._module("token_ce", TokenCE)
        self._text_weighting = None if token_ce is None else TextWeighting(token_ce)
        if token_ce is None and configured is not None:
            self._text_weighting = configured._text_weighting
        self._geo, self._geo_scale = self._module("bbox_geo", BboxGeo)
        self._reg, self._reg_scale = self._module("coord_reg", CoordReg)
        self._temperature = 1.0 if self._reg is None else self._reg.temperature
        if configured is not None:
            self._temperature = configured._temperature
        self._last: tuple[tuple[int, dict[str, float]], Stage2Objective] | None = None

    def at(self, step: int, knobs: Mapping[str, float] | None = None) -> Stage2Objective:
        """The objective of optimizer step `step`: itself where nothing changes over the run.

        knobs: see `ModuleSpec.at`.
        """
        when = (step, dict(knobs or {}))
        if self._last is None or self._last[0] != when:
            spec = self.spec.at(step, knobs)
            self._last = (when, self if spec == self.spec else self._of_step(spec))
        return self._last[1]

    def _of_step(self, spec: ObjectiveSpec) -> Stage2Objective:
        return Stage2Objective(spec, self.decode_mode, configured=self)

    def needs(self, forward: ForwardKind) -> LossNeeds:
        """What a head has to compute for this forward."""
        weights = self.coord_weights(forward)
        return LossNeeds(
            temperature=self._temperature,
            text_odds="text_gate" in weights,
            coord_odds="coord_gate" in weights or self.has_diagnostics(forward),
        )

    def has_diagnostics(self, forward: ForwardKind) -> bool:
        """Does coord_diag watch this forward?"""
        entry = self.spec.find("coord_diag")
        return entry is not None and entry.weight_in(forward.channel) > 0

    def text_weights(self, forward: ForwardKind) -> dict[str, float]:
        """Effective weights of the text atoms of the forward; none that is 0."""
        scale = self._text_scale[forward.channel]
        if self._text_weighting is None or scale == 0:
            return {}
        if forward is ForwardKind.SELF_CONTEXT:
            scale *= self._text_weighting.config.self_context_struct_ce_weight
            return {"struct_ce": scale} if scale else {}
        named = {"desc_ce": TextRole.DESC, "matched_desc_ce": TextRole.MATCHED_DESC}
        weighting = self._text_weighting
        return {"struct_ce": scale} | {
            name: scale for name, role in named.items() if weighting.role_weight(forward, role) > 0
        }

    def coord_weights(self, forward: ForwardKind) -> dict[str, float]:
        """Effective weights of the coordinate atoms of the forward; none that is 0."""
        if forward.coord is None:
            return {}
        weights: dict[str, float] = {}
        if self._geo is not None:
            scale = self._geo_scale[forward.channel]
            weights["bbox_smoothl1"] = scale * self._geo.smoothl1_weight
            weights["bbox_ciou"] = scale * self._geo.ciou_weight
        if self._reg is not None:
            scale, reg = self._reg_scale[forward.channel], self._reg
            self_context = reg.self_context_soft_ce_weight if forward.channel == "A" else 0.0
            weights["coord_token_ce"] = scale * reg.coord_ce_weight
            weights["coord_soft_ce"] = scale * (reg.soft_ce_weight + self_context)
            weights["coord_w1"] = scale * reg.w1_weight
            weights["coord_el1"] = scale * reg.coord_el1_weight
            weights["coord_ehuber"] = scale * reg.coord_ehuber_weight
            weights["coord_entropy"] = scale * reg.coord_entropy_weight
            weights["coord_gate"] = scale * reg.coord_gate_weight
            weights["text_gate"] = scale * reg.text_gate_weight
        return {name: weight for name, weight in weights.items() if weight}

    def counts(self, rows: SupervisedRows, forward: ForwardKind) -> dict[str, Tensor]:
        """This forward's share of the denominators, by name, as 0-dim float tensors.

        Add them up by name over all forwards of the step and over all ranks. Same names on every rank.
        """
        total_weight, gated_R = self._text_denominators(rows, forward)
        counts = {forward.text: total_weight}
        if forward.coord is not None:
            counts[f"{forward.coord}/boxes"] = torch.full_like(total_weight, rows.num_boxes)
            counts[f"{forward.coord}/slots"] = torch.full_like(total_weight, rows.num_coord)
            counts[f"{forward.coord}/text_gate"] = gated_R.sum().to(total_weight.dtype)
        return counts

    def num_supervised(self, rows: SupervisedRows, forwards: Sequence[ForwardKind]) -> int:
        """Rows with a loss in any of the forwards that run over them. Rows on the host."""
        is_text_R = torch.zeros(rows.num_text, dtype=torch.bool)
        for forward in forwards:
            if self._text_weighting is not None and self.text_weights(forward):
                is_text_R |= self._text_weighting(rows, forward).ce_R > 0
        has_coord = any(self.coord_weights(forward) for forward in forwards)
        return int(is_text_R.sum()) + (rows.num_coord if has_coord else 0)

    def __call__(
        self, inputs: LossInputs, forward: ForwardKind, counts: Counts
    ) -> tuple[Tensor, Stage2Terms]:
        """The forward's share of the step's loss, and its terms. No host sync.

        `inputs` must hold what `needs(forward)` names; `counts` are those of the whole optimizer step.
        """
        weighted = self._text_atoms(inputs, forward) | self._coord_atoms(inputs, forward)
        loss = inputs.text_ce_R.sum() * 0.0  # stays connected to the model when a forward has no atom
        for key, atom in weighted.items():
            loss = loss + divide(atom.sum, _denominator(key, forward, counts))
        return loss, self._terms(inputs, forward, {key: atom.detach() for key, atom in weighted.items()})

    def atom_names(self, forward: ForwardKind) -> list[str]:
        """Keys of the atoms of the forward, in their order."""
        text = [loss_atom(forward.text, name) for name in self.text_weights(forward)]
        coord = self.coord_weights(forward)
        return text + [loss_atom(str(forward.coord), name) for name in coord]

    def atom_losses(self, inputs: LossInputs, forward: ForwardKind, counts: Counts) -> dict[str, Tensor]:
        """What each atom adds to the step's loss, 0-dim, with its graph; arguments as for `__call__`."""
        weighted = self._text_atoms(inputs, forward) | self._coord_atoms(inputs, forward)
        return {key: divide(atom.sum, _denominator(key, forward, counts)) for key, atom in weighted.items()}

    def shares(self, terms: Stage2Terms, counts: Counts) -> dict[str, Tensor]:
        """What each atom of a forward adds to the step's loss, 0-dim, by its `loss/...` key; they sum to that loss."""
        shares = {}
        for key, atom in terms.atoms.items():
            forward = next(kind for kind in ForwardKind if key.split("/")[1] in (kind.text, kind.coord))
            shares[key] = divide(atom.sum, _denominator(key, forward, counts))
        return shares

    def _module(self, name: str, kind: type[Config]) -> tuple[Config | None, dict[str, float]]:
        """Settings of a module (None if it is off everywhere) and its weight by channel."""
        entry = self.spec.find(name)
        if entry is None or not isinstance(entry.config, kind):
            return None, dict.fromkeys(CHANNELS, 0.0)
        scale = {channel: entry.weight_in(channel) for channel in CHANNELS}
        return (entry.config if any(scale.values()) else None), scale

    def _text_denominators(self, rows: SupervisedRows, forward: ForwardKind) -> tuple[Tensor, Tensor]:
        """Total weight of the text rows, 0-dim, and which of them the text gate acts on, bool [num_text]."""
        if self._text_weighting is None:
            nothing_R = torch.zeros(rows.num_text, dtype=torch.bool, device=rows.targets_R.device)
            return nothing_R.sum().float(), nothing_R
        weights = self._text_weighting(rows, forward)
        return weights.ce_R.sum(), weights.gated_R

    def _text_atoms(self, inputs: LossInputs, forward: ForwardKind) -> dict[str, SumCount]:
        """struct_ce, desc_ce and matched_desc_ce, over the total weight of all text rows."""
        atom_weights = self.text_weights(forward)
        if self._text_weighting is None or not atom_weights:
            return {}
        weights = self._text_weighting(inputs.rows, forward)
        weighted_ce_R = weights.ce_R * inputs.text_ce_R
        selected = {
            "struct_ce": ~(weights.is_desc_R | weights.is_matched_desc_R),
            "desc_ce": weights.is_desc_R,
            "matched_desc_ce": weights.is_matched_desc_R,
        }
        return {
            loss_atom(forward.text, name): SumCount(
                weight * (weighted_ce_R * selected[name]).sum(), weights.ce_R.sum()
            )
            for name, weight in atom_weights.items()
        }

    def _coord_atoms(self, inputs: LossInputs, forward: ForwardKind) -> dict[str, SumCount]:
        weights = self.coord_weights(forward)
        if forward.coord is None:
            return {}
        atom_of = self._box_atoms(inputs, weights) | self._slot_atoms(inputs, weights)
        if "text_gate" in weights:
            atom_of["text_gate"] = self._text_gate(inputs, forward)
        return {
            loss_atom(forward.coord, name): SumCount(weight * atom_of[name].sum, atom_of[name].count)
            for name, weight in weights.items()
        }

    def _box_atoms(self, inputs: LossInputs, weights: Mapping[str, float]) -> dict[str, SumCount]:
        """bbox_geo: the coordinate rows of boxes, four by four."""
        if not {"bbox_smoothl1", "bbox_ciou"} & set(weights):
            return {}
        dist, of_boxes = inputs.distribution, slice(0, 4 * inputs.rows.num_boxes)
        pred_B4 = box.decode(dist, self.decode_mode)[of_boxes].view(-1, 4)
        gt_B4 = (inputs.rows.bins_N[of_boxes].to(pred_B4.dtype) / (dist.num_bins - 1)).view(-1, 4)
        return {
            "bbox_smoothl1": box.bbox_smoothl1(pred_B4, gt_B4),
            "bbox_ciou": box.bbox_ciou(pred_B4, gt_B4),
        }

    def _slot_atoms(self, inputs: LossInputs, weights: Mapping[str, float]) -> dict[str, SumCount]:
        """coord_reg on every coordinate row, of boxes and polygons alike; only what has a weight is computed."""
        if self._reg is None:
            return {}
        reg, dist, bins_N = self._reg, inputs.distribution, inputs.rows.bins_N
        rows: dict[str, Tensor] = {}
        if {"coord_soft_ce", "coord_w1"} & set(weights):
            per_side = reg.target_sigma_per_side
            sigma = atoms.sigma_rows(
                last_value(reg.target_sigma),
                None if per_side is None else last_value(per_side),
                inputs.rows.sides_N,
            )
            target_NK = atoms.gaussian_targets(
                bins_N, dist.num_bins, sigma, reg.target_truncate, dtype=dist.logits_NK.dtype
            )
            rows["coord_soft_ce"] = atoms.soft_ce_rows(dist, target_NK)
            rows["coord_w1"] = atoms.w1_rows(dist, target_NK)
        if "coord_token_ce" in weights:
            rows["coord_token_ce"] = atoms.token_ce_rows(dist, bins_N)
        if "coord_el1" in weights:
            rows["coord_el1"] = atoms.el1_rows(dist, bins_N)
        if "coord_ehuber" in weights:
            rows["coord_ehuber"] = atoms.ehuber_rows(dist, bins_N, reg.coord_huber_delta)
        if "coord_entropy" in weights:
            rows["coord_entropy"] = atoms.entropy_rows(dist)
        if "coord_gate" in weights:
            rows["coord_gate"] = atoms.gate_rows(_present(inputs.coord_log_odds_N, "coord_log_odds_N"))
        return {name: sum_count(values_N) for name, values_N in rows.items()}

    def _text_gate(self, inputs: LossInputs, forward: ForwardKind) -> SumCount:
        """Over the gated rows, unweighted."""
        _, gated_R = self._text_denominators(inputs.rows, forward)
        gate_R = atoms.text_gate_rows(_present(inputs.text_log_odds_R, "text_log_odds_R"))
        return SumCount(torch.where(gated_R, gate_R, 0.0).sum(), gated_R.sum().to(gate_R.dtype))

    def _terms(self, inputs: LossInputs, forward: ForwardKind, logged: dict[str, SumCount]) -> Stage2Terms:
        if not self.has_diagnostics(forward):
            return Stage2Terms(logged, {}, None, inputs.coord_logits_NK.detach().flatten()[:0])
        rows = atoms.monitor_rows(
            inputs.distribution, inputs.rows.bins_N, _present(inputs.coord_log_odds_N, "coord_log_odds_N")
        )
        abs_err_N = rows["expected_bin_mae"]
        rows["coord_vocab_mass_mean"] = rows.pop("coord_vocab_mass")
        del rows["w1_to_delta"]  # a stage-1 monitor
        key_of = partial(coord_diagnostic, forward.diagnostics)
        monitors = {key_of(name): sum_count(values_N) for name, values_N in rows.items()}
        num_coord = sum_count(abs_err_N).count
        monitors[key_of("coord_tokens_total")] = SumCount(num_coord, torch.ones_like(num_coord))
        return Stage2Terms(logged, monitors, key_of("expected_bin_abs_err_p90"), abs_err_N)


def check_atoms_sum(loss: float, atoms_by_key: Mapping[str, float], rel_tol: float = 1e-5) -> None:
    """Debug check of a finished step: its `loss/*` atoms must sum to its loss. ContractError if not."""
    total = sum(atoms_by_key.values())
    scale = max(abs(loss), sum(abs(value) for value in atoms_by_key.values()), 1e-12)
    if not abs(total - loss) <= rel_tol * scale:
        listed = ", ".join(f"{key} = {value:.6g}" for key, value in sorted(atoms_by_key.items()))
        raise ContractError(f"loss {loss:.8g} is not the sum {total:.8g} of its atoms: {listed or 'none'}")


def _denominator(key: str, forward: ForwardKind, counts: Counts) -> Tensor | float:
    """What an atom is divided by: a step-wide count."""
    _, provenance, name = key.split("/")
    if provenance == forward.text:
        return counts[forward.text]
    if name == "bbox_smoothl1":
        return 4 * counts[f"{provenance}/boxes"]
    over = {"bbox_ciou": "boxes", "text_gate": "text_gate"}.get(name, "slots")
    return counts[f"{provenance}/{over}"]


def _present(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ContractError(f"LossInputs.{name} is missing: make the inputs with objective.needs(forward)")
    return value
