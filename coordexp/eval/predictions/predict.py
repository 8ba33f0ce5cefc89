"""Ask a checkpoint for its detections: records -> rollouts -> parsed predictions -> artefacts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.pieces import token_names
from coordexp.codec.records import Record
from coordexp.eval.predictions.artifacts import ANSWER_FORM, BAD_PICTURE, artifact_line, bad_picture_line
from coordexp.eval.predictions.distributions import COORD_DISTRIBUTIONS, distributions_entry
from coordexp.eval.predictions.log import PredictionLog
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.types import Rollout, RolloutRequest


def predict(
    records: Sequence[Record],
    requests: Sequence[RolloutRequest],
    backend: RolloutBackend,
    tokenizer: Any,
    log: PredictionLog,
    *,
    form: AnswerForm | None = None,
    chunk_size: int = 64,
    picture_faults: Callable[[int, int], list[str | None]] | None = None,
    on_images: Callable[[int], object] | None = None,
) -> None:
    """Write the lines of every image that `log` does not hold yet, and finish it.

    requests: one per record, in order.  form: of the answers; None: CoordJSON.
    on_images: called with the number of images just done.
    picture_faults: called with the first index of the next records and the one behind their last; says why each cannot
        be asked about, None where it can. Those are not asked; their lines have no predictions, and `errors` says so.
    """
    form = form or form_of()
    for start in range(log.num_done, len(records), chunk_size):
        stop = min(start + chunk_size, len(records))
        faults = picture_faults(start, stop) if picture_faults is not None else [None] * (stop - start)
        lines, traces = answer(
            records[start:stop], requests[start:stop], backend, tokenizer, form, first_id=start, faults=faults
        )
        log.append(lines, traces)
        if on_images is not None:
            on_images(stop - start)
    log.finish()


def answer(
    records: Sequence[Record],
    requests: Sequence[RolloutRequest],
    backend: RolloutBackend,
    tokenizer: Any,
    form: AnswerForm,
    *,
    first_id: int = 0,
    faults: Sequence[str | None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of `gt_vs_pred.jsonl`, lines of the token trace) of some records.

    first_id: image id of the first.  faults: why each cannot be asked about, None where it can.
    """
    faults = [None] * len(records) if faults is None else faults
    asked = [request for request, fault in zip(requests, faults, strict=True) if fault is None]
    rollouts = iter(backend.generate(asked) if asked else ())
    lines, traces = [], []
    for image_id, (record, fault) in enumerate(zip(records, faults, strict=True), start=first_id):
        if fault is not None:
            lines.append(bad_picture_line(record, image_id, fault))
            traces.append(_no_trace(record, image_id))
            continue
        rollout = next(rollouts)
        parsed = form.parse(rollout.response_token_ids, tokenizer)
        lines.append(artifact_line(record, image_id, parsed, form.strict_json(parsed.text)))
        traces.append(_trace_line(record, image_id, rollout, parsed, tokenizer, form))
    return lines, traces


def _no_trace(record: Record, image_id: int) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image": record.images[0],
        "text": "",
        "generated_token_text": [],
        "token_logprobs": [],
        "object_token_positions": [],
        "object_desc_token_positions": [],
        "num_prompt_tokens": None,
        "finish_reason": BAD_PICTURE,
        "seconds": 0.0,
        "retokenized": False,
    }


def _trace_line(
    record: Record, image_id: int, rollout: Rollout, parsed: ParsedRollout, tokenizer: Any, form: AnswerForm
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image": record.images[0],
        "text": parsed.text,
        "generated_token_text": token_names(tokenizer, rollout.response_token_ids),
        "token_logprobs": [value if math.isfinite(value) else None for value in rollout.token_logprobs],
        "object_token_positions": [list(obj.token_positions) for obj in parsed.objects],
        "object_desc_token_positions": [list(range(*obj.desc_token_span)) for obj in parsed.objects],
        "num_prompt_tokens": len(rollout.prompt_token_ids) or None,
        "finish_reason": rollout.finish_reason,
        "seconds": rollout.seconds,
        "retokenized": rollout.retokenized,
        **({} if form.name == "coordjson" else {ANSWER_FORM: form.name}),
        **({COORD_DISTRIBUTIONS: found} if (found := distributions_entry(rollout)) else {}),
    }
