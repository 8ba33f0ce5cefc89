"""The plans of the first steps of a run, on disk: what `coordexp audit` checks against the data and the model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp.data.batch_meta import META_KEY
from coordexp.files import atomic_file
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.step.plan import PlannedForward, StepPlan

DUMP_FOLDER = "step_dumps"


def write_plan(plan: StepPlan, folder: Path, rank: int) -> Path:
    """`step000000_rank0.pt`: plain containers of tensors on the host, loadable without our code."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step{plan.step:06d}_rank{rank}.pt"
    content = {
        "step": plan.step,
        "rank": rank,
        "channel": None if plan.channel is None else str(plan.channel),
        "kinds": [kind.name for kind in plan.kinds],
        "totals": {name: float(total) for name, total in plan.totals.items()},
        "forwards": [_forward(forward) for forward in plan.forwards],
        "answers": [] if plan.rolled_out is None else _answers(plan.rolled_out),
    }
    with atomic_file(path, "wb") as file:
        torch.save(content, file)
    return path


def read_plans(folder: Path) -> list[dict[str, Any]]:
    """All dumps of a run, by step and rank."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("step*_rank*.pt"))]


def _forward(forward: PlannedForward) -> dict[str, Any]:
    meta = forward.meta
    return {
        "inputs": {name: _host(value) for name, value in forward.inputs.items() if name != META_KEY},
        "rows": {field.name: _host(getattr(meta.rows, field.name)) for field in fields(meta.rows)},
        "slots_N": _host(forward.slots_N),
        "sample_ids": list(meta.sample_ids),
        "num_samples": meta.num_samples,
        "is_filler": forward.is_filler,
    }


def _answers(rolled_out: RolledOut) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": answer.raw.sample_id,
            "prompt_token_ids": list(answer.rollout.prompt_token_ids),
            "response_token_ids": list(answer.rollout.response_token_ids),
            "policy_version": answer.rollout.policy_version,
            "num_tokens": len(answer.parsed.response_token_ids),
            "num_gt": len(answer.raw.objects),
            "num_pred": len(answer.parsed.objects),
            "num_matched": len(answer.match.matched),
            "num_supervised": outcome.num_supervised,
            "num_invalid": answer.parsed.dropped_invalid,
            "num_ambiguous": answer.parsed.dropped_ambiguous,
            "truncated": answer.parsed.truncated,
            "num_candidates": answer.match.num_candidates,
            "gating_rejections": answer.match.gating_rejections,
            "maskiou_sum": answer.match.maskiou_sum,
        }
        for answer, outcome in zip(rolled_out.answers, rolled_out.outcomes, strict=True)
    ]


def _host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
