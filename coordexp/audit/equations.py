"""Every number of one step's payload again, in float64, from the dumped inputs and the weights the step starts from.

The formulas are written a second time here, from the definitions in runbooks/metrics.md, and share nothing with the
losses and metrics of training but the catalogue's names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.audit.findings import DifferenceError
from coordexp.audit.rows64 import Rows, Sums
from coordexp.audit.stage2_equations import Stage2Equations
from coordexp.codec.token_types import TokenType
from coordexp.losses.modules import ForwardKind
from coordexp.metrics import keys_rollout, keys_stage1, keys_tokens
from coordexp.metrics.keys_run import LOSS
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context

REL, ABS = 2e-4, 2e-5
"""What float32 may differ from float64 by."""


def check_equations(
    plans: list[dict[str, Any]],
    payload: Mapping[str, float],
    config: Mapping[str, Any],
    model: nn.Module,
    ids_K: Tensor,
) -> str:
    """Compare a step's payload with its recomputation.

    plans: the dumps of one step, one per rank.  model: in float64, at the weights before the step.
    ids_K: coordinate token ids in bin order.
    """
    expected = recompute(plans, config, model, ids_K)
    expected |= _bookkeeping(plans, payload)
    if len(plans) == 1:
        expected |= _tokens_per_second(payload)
    compared = 0
    for key, value in sorted(expected.items()):
        if key not in payload:
            raise DifferenceError(f"{key} should be {value:.6g}, but the payload lacks it")
        if abs(payload[key] - value) > ABS + REL * abs(value):
            raise DifferenceError(f"{key} is {payload[key]:.8g} in the payload, {value:.8g} in float64")
        compared += 1
    left = sorted({key.split("/")[0] for key in payload.keys() - expected.keys()})
    return f"{compared} of {len(payload)} numbers; not recomputed: {', '.join(left)}"


@torch.no_grad()
def recompute(
    plans: list[dict[str, Any]], config: Mapping[str, Any], model: nn.Module, ids_K: Tensor
) -> dict[str, float]:
    """The payload of a step, as far as its dump decides it."""
    sums, loss = Sums(), 0.0
    p90: dict[str, list[float]] = defaultdict(list)
    for plan in plans:
        for forward in plan["forwards"]:
            if forward["is_filler"]:
                continue
            logits = _logits(forward, plan["kinds"], config, model, ids_K)
            for kind, logits_SV in logits.items():
                rows = Rows.of(forward["rows"], logits_SV, ids_K)
                if plan["channel"] is None:
                    _stage1(sums, p90, rows, config["custom"]["coord_soft_ce_w1"])
                    sums.add(keys_stage1.PACK_NUM_SAMPLES, forward["num_samples"])
                else:
                    loss += Stage2Equations(config, plan["totals"], sums, p90).add(rows, kind)
                if kind is not ForwardKind.SELF_CONTEXT:
                    _tokens(sums, rows, config["custom"]["token_type_metrics"])
    values = sums.values() | _rollouts(plans) | {key: sum(each) / len(each) for key, each in p90.items()}
    if plans[0]["channel"] is None:
        values |= _stage1_totals(values, config["custom"]["coord_soft_ce_w1"])
    else:
        values[LOSS] = loss
    return values


def _logits(
    forward: Mapping[str, Any], kinds: list[str], config: Mapping[str, Any], model: nn.Module, ids_K: Tensor
) -> dict[ForwardKind, Tensor]:
    """Flattened logits [B * T, V] of each kind that the forward was run for."""
    inputs = {
        key: value for key, value in forward["inputs"].items() if key in _MODEL_INPUTS and value is not None
    }
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    found = [ForwardKind[name] for name in kinds]
    if len(found) == 1:
        logits_BTV = model(**inputs, use_cache=False).logits
        return {found[0]: logits_BTV.flatten(0, 1)}
    section = config["stage2_ab"]
    settings = SelfContext(
        num_forwards=section["n_softctx_iter"],
        embed_mode=section["coord_ctx_embed_mode"],
        grad_mode=section["softctx_grad_mode"],
        temperature=section["softctx_temperature"],
    )
    slots = CoordSlots(forward["slots_N"], ids_K)

    def run(_iteration: int) -> tuple[Tensor, Tensor]:
        logits_BTV = model(**inputs, use_cache=False).logits
        return logits_BTV, logits_BTV.flatten(0, 1)[slots.rows_N][:, ids_K]

    all_logits = run_self_context(model, slots, settings, run)
    return {found[0]: all_logits[0].flatten(0, 1), found[1]: all_logits[-1].flatten(0, 1)}


_MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"
)  # fmt: skip


def _stage1(sums: Sums, p90: dict[str, list[float]], rows: Rows, settings: Mapping[str, Any]) -> None:
    terms = rows.terms(settings["temperature"], settings["target_sigma"], settings["target_truncate"])
    num_coord = rows.bins_N.numel()
    sums.add(keys_stage1.BASE_CE_NONCOORD_TOKENS, rows.num_text)
    sums.add(keys_stage1.BASE_CE_LOSS, rows.ce_R[: rows.num_text].sum(), rows.num_text)
    if not num_coord:
        return
    weighted = sum(settings[f"{name}_weight"] * terms[name] for name in ("soft_ce", "w1", "ce", "gate"))
    has_gate = settings["gate_weight"] > 0 or settings["monitor_mass"]
    named = {"loss": weighted, **{name: terms[name] for name in ("soft_ce", "w1", "ce")}}
    named |= {"gate": terms["gate"]} if has_gate else {}
    for name, values_N in named.items():
        for area in ("coord_diag", "coord_softce_w1"):
            sums.add(f"{area}/{name}", values_N.sum(), num_coord)
    monitors = ["acc_top5", "p_gt_mean", "margin_mean", "expected_bin_mae", "w1_to_delta"]
    for name in [*monitors, *(["coord_vocab_mass"] if has_gate else [])]:
        sums.add(f"coord_diag/{name}", terms[name].sum(), num_coord)
    sums.add(keys_stage1.COORD_DIAG_COORD_TOKENS, num_coord)
    sums.add(keys_stage1.COORD_DIAG_ENABLED, float(settings["enabled"]))
    error = terms["expected_bin_mae"]
    p90[keys_stage1.COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90].append(float(error.quantile(0.9)))
    sums.add("_coord_ce", rows.ce_R[rows.num_text :].sum(), num_coord)


def _stage1_totals(values: dict[str, float], settings: Mapping[str, Any]) -> dict[str, float]:
    values.pop("_coord_ce", None)
    if not settings["enabled"]:
        return {}
    return {LOSS: values[keys_stage1.BASE_CE_LOSS] + values.get(keys_stage1.COORD_DIAG_LOSS, 0.0)}


ACC = {
    "desc": keys_tokens.DESC_TOKEN_ACC,
    "format": keys_tokens.FORMAT_TOKEN_ACC,
    "coord": keys_tokens.COORD_TOKEN_ACC,
}
TOP5 = {
    "desc": keys_tokens.DESC_TOKEN_ACC_TOP5,
    "format": keys_tokens.FORMAT_TOKEN_ACC_TOP5,
    "coord": keys_tokens.COORD_TOKEN_ACC_TOP5,
}
FRAC = {
    "desc": keys_tokens.DESC_TOKEN_FRAC,
    "format": keys_tokens.FORMAT_TOKEN_FRAC,
    "coord": keys_tokens.COORD_TOKEN_FRAC,
}
TO_COORD = {
    "text": keys_tokens.FLIP_TEXT_TO_COORD,
    "format": keys_tokens.FLIP_FORMAT_TO_COORD,
    "desc": keys_tokens.FLIP_DESC_TO_COORD,
}
MASS = {
    "coord": keys_tokens.COORD_VOCAB_MASS_AT_GT_COORD,
    "text": keys_tokens.COORD_VOCAB_MASS_AT_GT_TEXT,
    "format": keys_tokens.COORD_VOCAB_MASS_AT_GT_FORMAT,
    "desc": keys_tokens.COORD_VOCAB_MASS_AT_GT_DESC,
}


def _tokens(sums: Sums, rows: Rows, settings: Mapping[str, Any]) -> None:
    """Accuracy of all rows; by token type, and probability in the wrong vocabulary, where rows have types."""
    predicted_R = rows.logits_RV.argmax(-1)
    hits_R = (predicted_R == rows.targets_R).double()
    sums.add(keys_tokens.TOKEN_ACC, hits_R.sum(), hits_R.numel())
    types_R = rows.raw["types_R"]
    if types_R is None:
        return
    if rows.num_text:
        sums.add(keys_tokens.TEXT_TOKEN_ACC, hits_R[: rows.num_text].sum(), rows.num_text)
    desc, coord = types_R == TokenType.DESC, types_R == TokenType.COORD
    formats = (types_R == TokenType.STRUCT) | (types_R == TokenType.EOS)
    groups = {"desc": desc, "format": formats, "coord": coord, "text": desc | formats}
    num_included = (groups["text"] | coord).sum()

    def split(names: Mapping[str, str], values_R: Tensor) -> None:
        for name, key in names.items():
            sums.add(key, (values_R * groups[name]).sum(), groups[name].sum())

    split(ACC, hits_R)
    for name, key in FRAC.items():
        sums.add(key, groups[name].sum(), num_included)
    is_coord_R = torch.isin(predicted_R, rows.ids_K).double()
    split(TO_COORD, is_coord_R)
    split({"coord": keys_tokens.FLIP_COORD_TO_NONCOORD}, 1 - is_coord_R)
    if settings["log_top5"]:
        at_target = rows.logits_RV.gather(1, rows.targets_R[:, None])
        top5_R = (rows.logits_RV > at_target).sum(-1).lt(5).double()
        sums.add(keys_tokens.TOKEN_ACC_TOP5, top5_R.sum(), top5_R.numel())
        split(TOP5, top5_R)
    if settings["coord_monitor_mass"] and not settings["coord_monitor_mass_max_tokens"]:
        split(MASS, rows.logits_RV.softmax(-1)[:, rows.ids_K].sum(-1))


def _bookkeeping(plans: Sequence[Mapping[str, Any]], payload: Mapping[str, float]) -> dict[str, float]:
    """Numbers of the run itself at its first step."""
    samples = sum(f["num_samples"] for plan in plans for f in plan["forwards"] if not f["is_filler"])
    expected = {keys_stage1.TRAIN_SAMPLES_TOTAL: samples, keys_stage1.TRAIN_SAMPLES_SEEN: samples}
    has_all = plans[0]["channel"] is None and plans[0]["step"] == 0
    return {key: float(value) for key, value in expected.items() if has_all and key in payload}


def _rollouts(plans: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rollouts of all ranks say; absent without rollouts, and ratios over nothing."""
    answers = [answer for plan in plans for answer in plan["answers"]]
    if not answers:
        return {}

    def total(name: str) -> float:
        return float(sum(answer[name] for answer in answers))

    num, tokens, gt, pred = float(len(answers)), total("num_tokens"), total("num_gt"), total("num_pred")
    matched, taught = total("num_matched"), total("num_supervised")
    started = pred + total("num_invalid") + total("num_ambiguous")
    keys = keys_rollout
    counts = {
        keys.GEN_NEW_TOKENS_TOTAL: tokens,
        keys.GT_OBJECTS_TOTAL: gt,
        keys.VALID_PRED_OBJECTS_TOTAL: pred,
        keys.MATCHED_FOR_SUPERVISION: taught,
        keys.EXCLUDED_FROM_SUPERVISION: matched - taught,
        keys.FN_TOTAL: gt - taught,
        keys.GATING_REJECTIONS: total("gating_rejections"),
        keys.MATCHED_MASKIOU_COUNT: matched,
        keys.PARSE_DROPPED_INVALID: total("num_invalid"),
        keys.PARSE_DROPPED_AMBIGUOUS: total("num_ambiguous"),
        keys.PARSE_TRUNCATED: total("truncated"),
        keys.PARSE_OBJ_TOTAL: started,
    }
    lengths = [len(answer["prompt_token_ids"]) for answer in answers]
    ratios = {
        keys.GEN_NEW_TOKENS_MEAN: (tokens, num),
        keys.PRECISION: (taught, pred),
        keys.RECALL: (taught, gt),
        keys.F1: (2 * taught, pred + gt),
        keys.GATING_REJECTION_RATE: (total("gating_rejections"), total("num_candidates")),
        keys.MATCHED_MASKIOU_MEAN: (total("maskiou_sum"), matched),
        keys.PARSE_TRUNCATED_RATE: (total("truncated"), num),
        keys.PARSE_OBJ_VALID_FRAC: (pred, started),
        keys.PARSE_OBJ_DROP_FRAC: (started - pred, started),
        keys.SAMPLE_VALID_PRED_RATE: (float(sum(bool(one["num_pred"]) for one in answers)), num),
        keys.SAMPLE_ANY_MATCH_RATE: (float(sum(one["num_supervised"] > 0 for one in answers)), num),
        keys.PROMPT_LEN_MEAN: (float(sum(lengths)), num),
        keys.ROLLOUT_LEN_MEAN: (tokens, num),
    }
    return counts | {key: over / under for key, (over, under) in ratios.items() if under}


def _tokens_per_second(payload: Mapping[str, float]) -> dict[str, float]:
    """The rate is the number over the seconds that the payload itself states (one rank)."""
    total, seconds = (
        payload.get(keys_rollout.GEN_NEW_TOKENS_TOTAL),
        payload.get(keys_rollout.TIME_ROLLOUT_GENERATE),
    )
    return {} if not total or not seconds else {keys_rollout.GEN_TOKENS_PER_S: total / seconds}
