"""A confidence for every predicted object, from the log-probabilities of the tokens that wrote it.

score = exp(mean log-probability of the object's coordinate tokens), taken at the token positions that the parser
recorded. An object whose tokens cannot be found is not given a made-up score: the reason is counted and the object
is left out of the scored file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from coordexp.errors import RecordError
from coordexp.eval.artifacts import (
    GT_VS_PRED,
    SCORED,
    TOKEN_TRACE,
    check_pixels,
    read_jsonl_lines,
    write_jsonl,
)
from coordexp.geometry import quantize_points

SCORE_SOURCE = "coord_token_logprob_mean_exp"
SCORE_VERSION = 1
_LINE_KEYS = ("image_id", "image", "width", "height", "coord_mode", "gt", "pred")
_TRACE_KEYS = ("image_id", "generated_token_text", "token_logprobs", "object_token_positions")


class ScoreFailure(StrEnum):
    """Why an object got no score."""

    POSITION_OUT_OF_RANGE = "position_out_of_range"
    """A recorded position lies beyond the generated tokens."""
    TOKEN_MISMATCH = "token_mismatch"
    """The tokens at the recorded positions are not the object's coordinates."""
    NONFINITE_LOGPROB = "nonfinite_logprob"
    """A log-probability is not a finite number."""


def object_score(
    obj: dict[str, Any], positions: Sequence[int], trace: dict[str, Any], width: int, height: int
) -> float | ScoreFailure:
    """Score of one predicted object, in (0, 1], or why it has none."""
    tokens, logprobs = trace["generated_token_text"], trace["token_logprobs"]
    if not positions or max(positions) >= len(tokens) or min(positions) < 0:
        return ScoreFailure.POSITION_OUT_OF_RANGE
    points = obj["points"]
    bins = quantize_points([points[i : i + 2] for i in range(0, len(points), 2)], width, height).reshape(-1)
    if [tokens[p] for p in positions] != [f"<|coord_{k}|>" for k in bins]:
        return ScoreFailure.TOKEN_MISMATCH
    values = [logprobs[p] for p in positions]
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        return ScoreFailure.NONFINITE_LOGPROB
    return math.exp(sum(values) / len(values))


def score_lines(
    lines: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Scored copies of `lines`, and how often each failure happened.

    Raises:
        RecordError: the two files are not of the same run (other images, order or number of objects).
    """
    if [line["image_id"] for line in lines] != [trace["image_id"] for trace in traces]:
        raise RecordError(
            f"{GT_VS_PRED} and {TOKEN_TRACE} list different images; they must come from the same `coordexp infer` run."
        )
    failures: Counter[str] = Counter()
    scored = []
    for line, trace in zip(lines, traces, strict=True):
        check_pixels(line, f"image {line['image_id']}")
        positions = trace["object_token_positions"]
        if len(positions) != len(line["pred"]):
            raise RecordError(
                f"image {line['image_id']}: {len(line['pred'])} predictions but {len(positions)} traced objects; the "
                "files must come from the same `coordexp infer` run."
            )
        kept = []
        for obj, where in zip(line["pred"], positions, strict=True):
            score = object_score(obj, where, trace, line["width"], line["height"])
            if isinstance(score, ScoreFailure):
                failures[score] += 1
            else:
                kept.append({**obj, "score": score})
        scored.append(
            {**line, "pred": kept, "pred_score_source": SCORE_SOURCE, "pred_score_version": SCORE_VERSION}
        )
    return scored, failures


def score_directory(directory: Path) -> Counter[str]:
    """Read the two files of an inference run and write `gt_vs_pred_scored.jsonl` beside them."""
    lines = read_jsonl_lines(directory / GT_VS_PRED, _LINE_KEYS)
    traces = read_jsonl_lines(directory / TOKEN_TRACE, _TRACE_KEYS)
    scored, failures = score_lines(lines, traces)
    write_jsonl(directory / SCORED, scored)
    return failures
