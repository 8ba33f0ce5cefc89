"""The plans of the first steps of a run, on disk: what `coordexp audit` checks against the data and the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordexp.codec.parse import ParsedRollout
from coordexp.data.batch_meta import META_KEY
from coordexp.files import atomic_file
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.step.plan import PlannedForward, StepPlan

DUMP_FOLDER = "step_dumps"


def write_plan(plan: StepPlan, folder: Path, rank: int, trained: Collection[str] = ()) -> Path:
    """`step000000_rank0.pt`: plain containers of tensors on the host, loadable without our code.

    trained: names of the parameters that have gradients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step{plan.step:06d}_rank{rank}.pt"
    content = {
        "step": plan.step,
        "rank": rank,
        "channel": None if plan.channel is None else str(plan.channel),
        "kinds": [kind.name for kind in plan.kinds],
        "load": asdict(plan.load),
        "knobs": dict(plan.knobs),
        "totals": {name: float(total) for name, total in plan.totals.items()},
        "forwards": [_forward(forward) for forward in plan.forwards],
        "answers": [] if plan.rolled_out is None else _answers(plan.rolled_out),
        "seconds": {} if plan.rolled_out is None else _seconds(plan.rolled_out),
        "trained": list(trained),
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
        "num_replaced": meta.num_replaced,
        "types_skipped": meta.types_skipped,
        "is_filler": forward.is_filler,
    }


def _answers(rolled_out: RolledOut) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": answer.raw.sample_id,
            "answer_index": index % rolled_out.num_answers,
            "prompt_token_ids": list(answer.rollout.prompt_token_ids),
            "response_token_ids": list(answer.rollout.response_token_ids),
            "policy_version": answer.rollout.policy_version,
            "repeat_terminated": answer.rollout.repeat_terminated,
            **_parsed(answer.parsed),
            "num_gt": len(answer.raw.objects),
            "gt_descs": [obj.desc for obj in answer.raw.objects],
            "gt_bins": [list(obj.bins) for obj in answer.raw.objects],
            "matched": [list(pair) for pair in answer.match.matched],
            "maskious": list(answer.match.maskious),
            "num_candidates": answer.match.num_candidates,
            "gating_rejections": answer.match.gating_rejections,
            "target": _target(outcome.sample) if isinstance(outcome.sample, EncodedSample) else None,
        }
        for index, (answer, outcome) in enumerate(zip(rolled_out.answers, rolled_out.outcomes, strict=True))
    ]


def _parsed(parsed: ParsedRollout) -> dict[str, Any]:
    return {
        "num_tokens": len(parsed.response_token_ids),
        "descs": [obj.desc for obj in parsed.objects],
        "bins": [list(obj.bins) for obj in parsed.objects],
        "dropped_by_reason": {str(reason): number for reason, number in parsed.dropped_by_reason.items()},
        "truncated": parsed.truncated,
        "prefix_is_fallback": parsed.prefix_is_fallback,
    }


def _target(sample: EncodedSample) -> dict[str, Any]:
    slots = np.concatenate([sample.box_positions_B4.ravel(), sample.poly_positions_N])
    return {
        "prompt_length": sample.prompt_length,
        "num_matched": sample.num_matched,
        "roles": torch.from_numpy(sample.roles_T.copy()),
        "types": torch.from_numpy(sample.types_T.copy()),
        "slots": torch.from_numpy(slots),
    }


def _seconds(rolled_out: RolledOut) -> dict[str, float]:
    """Of this rank."""
    return {
        "generate": rolled_out.generate_s,
        "parse_match": rolled_out.parse_match_s,
        "encode": rolled_out.encode_s,
    }


def _host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
