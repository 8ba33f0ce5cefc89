"""Every number of one step's payload again, in float64, from the dump of the step and the weights it starts from.

The formulas are written a second time here, from the definitions in runbooks/metrics.md, and share nothing with the
losses and metrics of training but the catalogue's names. A number without an equation, and without a reason for that
(`run_equations.NOT_RECOMPUTED`), fails the check by its name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.audit.findings import DifferenceError
from coordexp.audit.forwards_worth import add_forwards, num_forwards
from coordexp.audit.rollout_equations import rollout_equations
from coordexp.audit.rows64 import Rows, Sums
from coordexp.audit.run_equations import DumpedStep, counted, run_equations
from coordexp.audit.stage1_equations import Stage1Equations
from coordexp.audit.stage2_equations import Stage2Equations
from coordexp.audit.token_equations import token_equations
from coordexp.losses.modules import ForwardKind
from coordexp.metrics.keys_run import GRAD_NORM, LOSS
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context

FLOAT32 = (2e-4, 2e-5)
HALF = (5e-2, 2e-2)
"""(relative, absolute) difference from float64 that training in this precision may have."""


def check_equations(step: DumpedStep, model: nn.Module, ids_K: Tensor) -> str:
    """Compare a step's payload with its recomputation.

    model: in float64, at the weights before the step.  ids_K: coordinate token ids in bin order.
    """
    expected = forward_equations(step, model, ids_K) | rollout_equations(step) | run_equations(step)
    relative, absolute = _tolerance(step.config)
    wrong = []
    for key, value in sorted(expected.items()):
        if key not in step.payload:
            wrong.append((key, f"should be {value:.6g}, but the payload lacks it"))
        elif not abs(step.payload[key] - value) <= absolute + relative * abs(value):
            wrong.append((key, f"is {step.payload[key]:.8g} in the payload, {value:.8g} in float64"))
    if wrong:
        others = f"; also wrong: {', '.join(key for key, _ in wrong[1:])}" if wrong[1:] else ""
        raise DifferenceError(f"step {step.step}: {' '.join(wrong[0])}{others}")
    left = sorted(step.payload.keys() - expected.keys())
    unknown = [key for key in left if key not in step.excused]
    if unknown:
        raise DifferenceError(
            f"step {step.step}: no equation says what {', '.join(unknown)} should be; the other {len(expected)} "
            "numbers agree"
        )
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key in left:
        by_reason[step.excused[key]].append(key)
    excused = (f"; not {', '.join(keys)}: {why}" for why, keys in by_reason.items())
    return f"{len(expected)} of {len(step.payload)} numbers{''.join(excused)}"


def _tolerance(config: Mapping[str, Any]) -> tuple[float, float]:
    swift = config["swift"]
    is_half = swift.get("bf16") or swift.get("fp16") or swift.get("torch_dtype") in ("bfloat16", "float16")
    return HALF if is_half else FLOAT32


def forward_equations(step: DumpedStep, model: nn.Module, ids_K: Tensor) -> dict[str, float]:
    """Loss, its parts, monitors and gradient of a step."""
    sums, loss = Sums(), 0.0
    p90: dict[str, list[float]] = defaultdict(list)
    names = set(step.plans[0]["trained"])
    trained = [weight.requires_grad_(name in names) for name, weight in model.named_parameters()]
    trained = [weight for weight in trained if weight.requires_grad]
    model.zero_grad()
    joint = bool(step.config["swift"]["average_tokens_across_devices"])
    for plan in step.plans:
        rows = [one["rows"] for other in (step.plans if joint else [plan]) for one in counted(other)]
        stage1 = (
            None
            if plan["channel"]
            else Stage1Equations(step.config, rows, sums, p90, step.step, plan.get("knobs", {}))
        )
        stage2 = (
            Stage2Equations(step.config, rows, sums, p90, step.step, plan.get("knobs", {}))
            if plan["channel"]
            else None
        )
        for forward in counted(plan):
            logits_of = _logits(forward, plan, step.config, model, ids_K)
            if any(
                one["kind"] == "softctx_economy"
                for one in step.config.get("control", {}).get("controllers", ())
            ):
                add_forwards(sums, forward, plan, step.config, logits_of, ids_K)
            share = torch.zeros((), dtype=torch.float64)
            for kind, logits_SV in logits_of.items():
                own = Rows.of(forward["rows"], logits_SV, ids_K)
                if stage1 is not None:
                    share = share + stage1.add(own, forward["num_samples"])
                if stage2 is not None:
                    share = share + stage2.add(own, kind)
                if kind is not ForwardKind.SELF_CONTEXT:
                    token_equations(sums, own.detached(), step.config["custom"]["token_type_metrics"])
            share = share if joint else share / len(step.plans)
            loss += float(share.detach())
            if trained and share.requires_grad:
                share.backward()
    values = sums.values() | {key: sum(each) / len(each) for key, each in p90.items()} | {LOSS: loss}
    if names and len(trained) == len(names):
        values[GRAD_NORM] = _norm(trained)
    return values


def _norm(weights: Sequence[Tensor]) -> float:
    """Length of all gradients as one vector."""
    return math.sqrt(sum(float(one.grad.square().sum()) for one in weights if one.grad is not None))


def _logits(
    forward: Mapping[str, Any],
    plan: Mapping[str, Any],
    config: Mapping[str, Any],
    model: nn.Module,
    ids_K: Tensor,
) -> dict[ForwardKind, Tensor]:
    """Flattened logits [B * T, V] of each kind that the forward was run for."""
    inputs = {
        key: value for key, value in forward["inputs"].items() if key in _MODEL_INPUTS and value is not None
    }
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    found = [ForwardKind[name] for name in plan["kinds"]]
    if len(found) == 1:
        logits_BTV = model(**inputs, use_cache=False).logits
        return {found[0]: logits_BTV.flatten(0, 1)}
    section = config["stage2_ab"]
    settings = SelfContext(
        num_forwards=num_forwards(plan, config),
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
