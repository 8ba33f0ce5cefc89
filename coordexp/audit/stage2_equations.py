"""The stage-2 objective a second time, in float64, from its definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coordexp.audit.rows64 import Rows, Sums, target_widths, with_weights
from coordexp.losses.inputs import TextRole
from coordexp.losses.modules import ForwardKind

PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "target_sigma": 2.0,
    "target_sigma_per_side": None,
    "target_truncate": None,
}
FLOOR = 1e-12


class Stage2Equations:
    """Atoms and diagnostics of the forwards of a step.

    Arguments:
        config: resolved_config.json.  sums, p90: what the numbers are added to.
        counted: dumped rows of all forwards that the losses are divided over.  step: of the run, 0 for the first.
        knobs: what controllers had in force.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        counted: Sequence[Mapping[str, Any]],
        sums: Sums,
        p90: dict[str, list[float]],
        step: int,
        knobs: Mapping[str, float],
    ) -> None:
        section = config["stage2_ab"] or config["rollout_matching"]
        self._decode_mode = section["coord_decode_mode"]
        self._modules = {
            one["name"]: with_weights(one, step, knobs, one["name"], "config")
            for one in section["pipeline"]["objective"]
        }
        self._diagnostics = {one["name"]: one for one in section["pipeline"]["diagnostics"]}
        self._counted, self._sums, self._p90, self._step = counted, sums, p90, step

    def add(self, rows: Rows, kind: ForwardKind) -> Tensor:
        """Adds a forward; returns its share of the step's loss."""
        loss = rows.logits_RV.new_zeros(()) + self._text(rows, kind)
        if rows.ids_K.numel() == 0:  # answers write numbers, which are text
            return loss
        reg = self._modules.get("coord_reg")
        settings = PLAIN if reg is None else reg["config"]
        sigma = target_widths(settings, self._step, _sides(rows.raw))
        terms = rows.terms(settings["temperature"], sigma, settings["target_truncate"])
        self._diagnose(rows, terms, kind)
        if kind.coord is None:
            return loss
        atoms = self._slot_atoms(rows, terms, kind) | self._box_atoms(rows, kind, settings["temperature"])
        for name, (total, count, denominator) in atoms.items():
            self._sums.add(f"loss/{kind.coord}/{name}", total, count)
            loss = loss + (total / denominator if denominator else 0.0)
        return loss + self._text_gate(rows, kind)

    def _diagnose(self, rows: Rows, terms: Mapping[str, Tensor], kind: ForwardKind) -> None:
        num = rows.bins_N.numel()
        if not num or not self._scale(self._diagnostics.get("coord_diag"), kind):
            return
        prefix = f"coord_diag/{kind.diagnostics}"
        for name in ("acc_top5", "p_gt_mean", "margin_mean", "expected_bin_mae"):
            self._sums.add(f"{prefix}/{name}", terms[name].sum(), num)
        self._sums.add(f"{prefix}/coord_vocab_mass_mean", terms["coord_vocab_mass"].sum(), num)
        self._sums.count(f"{prefix}/coord_tokens_total", num)
        error = float(terms["expected_bin_mae"].detach().quantile(0.9))
        self._p90[f"{prefix}/expected_bin_abs_err_p90"].append(error)

    def _scale(self, module: Mapping[str, Any] | None, kind: ForwardKind) -> float:
        is_on = module is not None and module["enabled"] and kind.channel in module["channels"]
        return float(module["weight"]) if is_on and module is not None else 0.0

    def _text(self, rows: Rows, kind: ForwardKind) -> Tensor | float:
        module = self._modules.get("token_ce")
        factor = self._scale(module, kind)
        if module is None or not factor:
            return 0.0
        config = module["config"]
        weight_R = text_weights(rows.raw, kind, config)
        denominator = sum(float(text_weights(raw, kind, config).sum()) for raw in self._counted)
        is_desc, is_matched = (rows.raw["roles_R"] == role for role in (TextRole.DESC, TextRole.MATCHED_DESC))
        if kind is ForwardKind.SELF_CONTEXT:
            factor *= config["self_context_struct_ce_weight"]
        wanted = {"struct_ce": ~(is_desc | is_matched)} | (
            {"desc_ce": is_desc} if desc_weight(kind, config) else {}
        )
        if kind is ForwardKind.ROLLOUT and config.get("rollout_matched_desc_weight", 0.0):
            wanted["matched_desc_ce"] = is_matched
        loss: Tensor | float = 0.0
        for name, chosen in wanted.items() if factor else ():
            total = factor * (weight_R * rows.ce_R[: rows.num_text] * chosen).sum()
            self._sums.add(f"loss/{kind.text}/{name}", total, weight_R.sum())
            loss = loss + (total / denominator if denominator else 0.0)
        return loss

    def _slot_atoms(
        self, rows: Rows, terms: Mapping[str, Tensor], kind: ForwardKind
    ) -> dict[str, tuple[Tensor, float, float]]:
        """coord_reg: (weighted sum, count, denominator of the step) by name."""
        module = self._modules.get("coord_reg")
        scale = self._scale(module, kind)
        if module is None or not scale:
            return {}
        config, num = module["config"], rows.bins_N.numel()
        z_NK, logp_NK, _ = rows.coord(config["temperature"])
        k = torch.arange(z_NK.shape[-1], dtype=torch.float64)
        d_NK = (k - rows.bins_N.double()[:, None]).abs() / (z_NK.shape[-1] - 1)
        delta = config["coord_huber_delta"]
        huber_NK = torch.where(d_NK <= delta, d_NK**2 / (2 * delta), d_NK - delta / 2)
        self_context = config["self_context_soft_ce_weight"] if kind.channel == "A" else 0.0
        weighted = {
            "coord_token_ce": (config["coord_ce_weight"], terms["ce"]),
            "coord_soft_ce": (config["soft_ce_weight"] + self_context, terms["soft_ce"]),
            "coord_w1": (config["w1_weight"], terms["w1"]),
            "coord_el1": (config["coord_el1_weight"], terms["el1"]),
            "coord_ehuber": (config["coord_ehuber_weight"], (logp_NK.exp() * huber_NK).sum(-1)),
            "coord_entropy": (config["coord_entropy_weight"], terms["entropy"]),
            "coord_gate": (config["coord_gate_weight"], terms["gate"]),
        }
        slots = sum(raw["bins_N"].numel() for raw in self._counted)
        return {
            name: (scale * weight * values_N.sum(), num, slots)
            for name, (weight, values_N) in weighted.items()
            if weight
        }

    def _box_atoms(
        self, rows: Rows, kind: ForwardKind, temperature: float
    ) -> dict[str, tuple[Tensor, float, float]]:
        module = self._modules.get("bbox_geo")
        scale = self._scale(module, kind)
        if module is None or not scale:
            return {}
        z_NK, logp_NK, _ = rows.coord(temperature)
        last = z_NK.shape[-1] - 1
        places_N = (logp_NK.exp() * torch.arange(last + 1, dtype=torch.float64)).sum(-1) / last
        if self._decode_mode == "st":  # the value of the arg-max with the gradient of the expectation
            places_N = z_NK.argmax(-1).double() / last + places_N - places_N.detach()
        of_boxes = slice(0, 4 * rows.raw["num_boxes"])
        pred_B4, true_B4 = places_N[of_boxes].view(-1, 4), (rows.bins_N[of_boxes].double() / last).view(-1, 4)
        num, boxes = pred_B4.shape[0], sum(raw["num_boxes"] for raw in self._counted)
        config, atoms = module["config"], {}
        if config["smoothl1_weight"]:
            smooth = F.smooth_l1_loss(pred_B4, true_B4, reduction="sum")
            atoms["bbox_smoothl1"] = (scale * config["smoothl1_weight"] * smooth, 4.0 * num, 4 * boxes)
        if config["ciou_weight"]:
            ciou = ciou_losses(pred_B4, true_B4).sum()
            atoms["bbox_ciou"] = (scale * config["ciou_weight"] * ciou, float(num), boxes)
        return atoms

    def _text_gate(self, rows: Rows, kind: ForwardKind) -> Tensor | float:
        module, text = self._modules.get("coord_reg"), self._modules.get("token_ce")
        weight = self._scale(module, kind) * (0.0 if module is None else module["config"]["text_gate_weight"])
        if module is None or text is None or not weight:
            return 0.0
        gated = _gated(rows.raw, kind, text["config"])
        denominator = sum(int(_gated(raw, kind, text["config"]).sum()) for raw in self._counted)
        z_RV = rows.logits_RV[: rows.num_text] / module["config"]["temperature"]
        others = torch.ones(z_RV.shape[-1], dtype=torch.bool)
        others[rows.ids_K] = False
        gate_R = z_RV.logsumexp(-1) - z_RV[:, others].logsumexp(-1)  # -log(1 - p_coord)
        total = weight * (gate_R * gated).sum()
        self._sums.add(f"loss/{kind.coord}/text_gate", total, gated.sum())
        return total / denominator if denominator else 0.0


def _sides(raw: Mapping[str, Any]) -> Tensor:
    """float64 [N]: width, height, width, height of every box, then 0 for the vertices of polygons."""
    bins_N, num = raw["bins_N"].double(), 4 * raw["num_boxes"]
    boxes_B4 = bins_N[:num].view(-1, 4)
    sides_B2 = (boxes_B4[:, 2:] - boxes_B4[:, :2]).abs()
    return torch.cat([sides_B2.repeat(1, 2).flatten(), torch.zeros_like(bins_N[num:])])


def _gated(raw: Mapping[str, Any], kind: ForwardKind, config: Mapping[str, float]) -> Tensor:
    """Text rows that coordinate tokens are kept from: those with a weight, without `<|im_end|>`; names in B alone."""
    roles: Tensor = raw["roles_R"]
    gated = (text_weights(raw, kind, config) > 0) & (roles != TextRole.EOS)
    return gated & (roles != TextRole.DESC) if kind.channel == "A" else gated


def desc_weight(kind: ForwardKind, config: Mapping[str, float]) -> float:
    """Weight of names in a forward."""
    if kind is ForwardKind.ROLLOUT:
        return config["rollout_fn_desc_weight"]
    return 0.0 if kind is ForwardKind.SELF_CONTEXT else config["desc_ce_weight"]


def text_weights(raw: Mapping[str, Any], kind: ForwardKind, config: Mapping[str, float]) -> Tensor:
    """w_t of every text row of a dumped forward, float64."""
    roles, in_rollout = raw["roles_R"], kind is ForwardKind.ROLLOUT
    by_role = torch.ones(len(TextRole), dtype=torch.float64)
    by_role[TextRole.DESC] = desc_weight(kind, config)
    by_role[TextRole.MATCHED_STRUCT] = config["rollout_matched_prefix_struct_weight"] if in_rollout else 0.0
    by_role[TextRole.MATCHED_DESC] = config.get("rollout_matched_desc_weight", 0.0) if in_rollout else 0.0
    weight_R = by_role[roles]
    if not in_rollout:
        return weight_R
    boosted_R = raw["dropped_invalid_R"] & (roles == TextRole.STRUCT)
    return torch.where(boosted_R, weight_R * config["rollout_drop_invalid_struct_ce_multiplier"], weight_R)


def ciou_losses(pred_B4: Tensor, true_B4: Tensor) -> Tensor:
    """1 - CIoU of boxes in [0, 1], corners put in order."""

    def ordered(box_B4: Tensor) -> Tensor:
        low = torch.minimum(box_B4[:, :2], box_B4[:, 2:])
        high = torch.maximum(box_B4[:, :2], box_B4[:, 2:])
        return torch.cat([low, high], 1).clamp(0, 1)

    a, b = ordered(pred_B4), ordered(true_B4)
    wh_a, wh_b = (a[:, 2:] - a[:, :2]).clamp(min=FLOOR), (b[:, 2:] - b[:, :2]).clamp(min=FLOOR)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(-1)
    iou = overlap / (wh_a.prod(-1) + wh_b.prod(-1) - overlap).clamp(min=FLOOR)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    centre = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).square().sum(-1)
    v = 4 / math.pi**2 * (torch.atan(wh_b[:, 0] / wh_b[:, 1]) - torch.atan(wh_a[:, 0] / wh_a[:, 1])).square()
    alpha = (v / (1 - iou + v).clamp(min=FLOOR)).detach()  # a constant for the gradient, as in the paper
    return 1 - iou + centre / hull.square().sum(-1).clamp(min=FLOOR) + alpha * v
