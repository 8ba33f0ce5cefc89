"""Ask a checkpoint for its detections: records -> rollouts -> parsed predictions -> artefacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordexp.codec.parse import parse_rollout
from coordexp.codec.records import Record
from coordexp.codec.serialize import to_strict_json
from coordexp.eval.artifacts import GT_VS_PRED, TOKEN_TRACE, artifact_line, write_jsonl
from coordexp.rollout.types import Rollout, RolloutBackend, RolloutRequest


def predict(
    records: Sequence[Record],
    requests: Sequence[RolloutRequest],
    backend: RolloutBackend,
    tokenizer: Any,
    output_dir: Path,
    *,
    field_order: str = "desc_first",
    chunk_size: int = 64,
    on_images: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Write `gt_vs_pred.jsonl` and `pred_token_trace.jsonl`; returns the lines of the former.

    requests: one per record, in order.  on_images: called with the number of images just done.
    """
    lines, traces = [], []
    for start in range(0, len(records), chunk_size):
        chunk = slice(start, start + chunk_size)
        rollouts = backend.generate(requests[chunk])
        for offset, (record, rollout) in enumerate(zip(records[chunk], rollouts, strict=True)):
            image_id = start + offset
            parsed = parse_rollout(rollout.response_token_ids, tokenizer, field_order=field_order)
            lines.append(artifact_line(record, image_id, parsed, _strict_json(parsed)))
            traces.append(_trace_line(image_id, rollout, parsed, tokenizer))
        if on_images is not None:
            on_images(len(rollouts))
    write_jsonl(output_dir / TOKEN_TRACE, traces)
    write_jsonl(output_dir / GT_VS_PRED, lines)
    return lines


def _strict_json(parsed: Any) -> str | None:
    """The whole answer with its coordinate tokens as numbers, None when that is not JSON."""
    text = to_strict_json(parsed.text)
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return None
    return text


def _trace_line(image_id: int, rollout: Rollout, parsed: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "text": parsed.text,
        "generated_token_text": tokenizer.convert_ids_to_tokens(list(rollout.response_token_ids)),
        "token_logprobs": list(rollout.token_logprobs),
        "object_token_positions": [list(obj.token_positions) for obj in parsed.objects],
        "num_prompt_tokens": len(rollout.prompt_token_ids),
        "finish_reason": rollout.finish_reason,
        "seconds": rollout.seconds,
    }
