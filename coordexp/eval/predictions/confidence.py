"""A confidence for every predicted object, from the log-probabilities of the tokens that wrote it.

score = exp(mean log-probability of the object's coordinate tokens), taken at the token positions that the parser
recorded. With desc fusion the mean log-probability of the description's tokens takes part with a weight w:
score = exp((1 - w) * coordinates + w * description). Where an answer writes numbers, the
log-probability of a coordinate is that of all of its digits together, and the mean is over coordinates.

Or score = expected IoU of the box under the distributions its coordinates were read from, times the probability of the
description's tokens (`coordexp.eval.predictions.box_confidence`).

An object whose tokens cannot be found is not given a made-up score: the reason is counted and the object is left out
of the scored file. Predictions and trace are checked to be of the same run, line by line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordexp.codec.descs import canonical_desc
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import token_bytes
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import (
    ANSWER_FORM,
    DISTRIBUTIONS,
    GT_VS_PRED,
    SCORED,
    TOKEN_TRACE,
    check_pixels,
    read_jsonl_lines,
)
from coordexp.eval.predictions.box_confidence import expected_ious, probs_of_atoms
from coordexp.eval.predictions.distributions import (
    COORD_DISTRIBUTIONS,
    atoms_by_position,
    lacks_distributions,
    with_distributions,
)
from coordexp.files import write_jsonl
from coordexp.geometry import quantize_points

Method = Literal["logprob", "expected_iou", "constant"]
_SOURCES: dict[Method, str] = {
    "logprob": "coord_token_logprob_mean_exp",
    "expected_iou": "expected_iou_times_desc_probability",
    "constant": "constant",
}
_FUSED_SOURCE = "coord_and_desc_token_logprob_mean_exp"
SCORE_VERSION = 1
_LINE_KEYS = ("image_id", "image", "width", "height", "coord_mode", "gt", "pred")
TRACE_KEYS = ("image_id", "generated_token_text", "token_logprobs", "object_token_positions")
_NUM_DRAWS = 1024  # of the expected IoU: a millisecond for three boxes, and an error below 0.005
_DESC_KEY = "object_desc_token_positions"
_SAME_RUN = "the files must come from the same `coordexp infer` run"


class ScoreFailure(StrEnum):
    """Why an object got no score."""

    MISSING_POSITIONS = "missing_positions"
    """No token positions were recorded for the object."""
    POSITION_OUT_OF_RANGE = "position_out_of_range"
    """A recorded position lies beyond the generated tokens."""
    TOKEN_MISMATCH = "token_mismatch"
    """The tokens at the recorded positions are not the object's coordinates."""
    DESC_MISMATCH = "desc_mismatch"
    """The tokens at the recorded positions are not the object's description (desc fusion only)."""
    MISSING_LOGPROBS = "missing_logprobs"
    """The answer came without log-probabilities."""
    NONFINITE_LOGPROB = "nonfinite_logprob"
    """A log-probability is not a finite number."""
    POSITIVE_LOGPROB = "positive_logprob"
    """A log-probability is above zero."""
    MISSING_DISTRIBUTION = "missing_distribution"
    """No distribution was recorded for one of the coordinates (expected IoU only)."""
    NOT_A_BOX = "not_a_box"
    """The expected IoU is of boxes, and this is a polygon."""


@dataclass(frozen=True)
class Scoring:
    """How objects are scored.

    method: "logprob", of tokens; "expected_iou", of boxes, from their distributions; "constant", 1.0 for all, for
    answers without log-probabilities.  desc_fusion: of "logprob", the weight of the description, 0 for coordinates
    alone.
    """

    method: Method = "logprob"
    desc_fusion: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.desc_fusion <= 1.0:
            raise ConfigError(f"desc fusion is {self.desc_fusion}: expected a weight in [0, 1]")
        if self.method == "constant" and self.desc_fusion:
            raise ConfigError("constant scores leave no room for desc fusion: ask for one of them")
        if self.method == "expected_iou" and self.desc_fusion:
            raise ConfigError("expected IoU has its own part of the description: ask for nothing beside it")

    def source(self, form: AnswerForm) -> str:
        """What `pred_score_source` says of answers in a form."""
        source = _FUSED_SOURCE if self.desc_fusion else _SOURCES[self.method]
        if self.method != "logprob" or form.has_coord_tokens:
            return source
        return source.replace("coord_token_", "coord_number_").replace("coord_and_", "coord_number_and_")


@dataclass(frozen=True, eq=False)
class LineScorer:
    """Scores the objects of one line, in (0, 1], or says why one has none."""

    line: Mapping[str, Any]
    trace: Mapping[str, Any]
    scoring: Scoring

    @cached_property
    def _form(self) -> AnswerForm:
        return form_of_trace(self.trace)

    @cached_property
    def _atoms(self) -> dict[int, tuple[list[int], list[float]]]:
        return atoms_by_position(self.trace)

    def score(self, index: int) -> float | ScoreFailure:
        """Of the object with this index in the line."""
        scoring = self.scoring
        if scoring.method == "constant":
            return 1.0
        obj, positions = self.line["pred"][index], self.trace["object_token_positions"][index]
        tokens = _tokens_at(positions, self.trace)
        if isinstance(tokens, ScoreFailure):
            return tokens
        coords = [[p] for p in positions] if self._form.has_coord_tokens else _neighbours(positions)
        points = np.reshape(obj["points"], (-1, 2))
        bins = quantize_points(points, self.line["width"], self.line["height"]).reshape(-1).tolist()
        if [self._bin_of(coord) for coord in coords] != bins:
            return ScoreFailure.TOKEN_MISMATCH
        if scoring.method == "expected_iou":
            return self._expected_iou(index, bins)
        mean = mean_coord_logprob(positions, self.trace["token_logprobs"], num_coords=len(bins))
        if isinstance(mean, ScoreFailure):
            return mean
        if not scoring.desc_fusion:
            return math.exp(mean)
        desc_mean = self._desc_mean(index)
        if isinstance(desc_mean, ScoreFailure):
            return desc_mean
        return math.exp((1.0 - scoring.desc_fusion) * mean + scoring.desc_fusion * desc_mean)

    def _bin_of(self, coord: Sequence[int]) -> int | None:
        """The bin that the tokens at these positions write; None when they write none."""
        tokens = self.trace["generated_token_text"]
        text = b"".join(token_bytes(tokens[p]) for p in coord).decode("utf-8", errors="replace")
        return self._form.bin_of_coord(text)

    def _expected_iou(self, index: int, bins: Sequence[int]) -> float | ScoreFailure:
        """Expected IoU of a box times the probability of its description, all of its tokens together."""
        positions = self.trace["object_token_positions"][index]
        if len(positions) != 4:
            return ScoreFailure.NOT_A_BOX
        if any(position not in self._atoms for position in positions):
            return ScoreFailure.MISSING_DISTRIBUTION
        desc_mean = self._desc_mean(index)
        if isinstance(desc_mean, ScoreFailure):
            return desc_mean
        probs_14K = np.stack([probs_of_atoms(*self._atoms[position]) for position in positions])[None]
        iou = float(expected_ious(probs_14K, [bins], num_draws=_NUM_DRAWS)[0])
        return iou * math.exp(desc_mean * len(self.trace[_DESC_KEY][index]))

    def _desc_mean(self, index: int) -> float | ScoreFailure:
        """Mean log-probability of the tokens of an object's description, or why there is none."""
        positions = self.trace[_DESC_KEY][index]
        tokens = _tokens_at(positions, self.trace)
        if isinstance(tokens, ScoreFailure):
            return tokens
        if not _is_written_by(self.line["pred"][index]["desc"], tokens):
            return ScoreFailure.DESC_MISMATCH
        return mean_logprob(positions, self.trace["token_logprobs"])


def score_lines(
    lines: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]], scoring: Scoring | None = None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Scored copies of `lines`, and how often each failure happened.

    Raises:
        RecordError: predictions and trace are not of the same run (other images, order, answers or number of
            objects), a trace is not aligned with itself, or no answer at all has log-probabilities.
    """
    scoring = scoring or Scoring()
    _check_same_images(lines, traces)
    failures: Counter[str] = Counter()
    scored = []
    for line, trace in zip(lines, traces, strict=True):
        _check_alignment(line, trace, scoring)
        kept, own_failures = [], Counter[str]()
        scorer = LineScorer(line, trace, scoring)
        for index, obj in enumerate(line["pred"]):
            score = scorer.score(index)
            if isinstance(score, ScoreFailure):
                own_failures[str(score)] += 1
            else:
                kept.append({**obj, "score": score})
        failures += own_failures
        source = scoring.source(form_of_trace(trace))
        made = {"pred_score_source": source, "pred_score_version": SCORE_VERSION}
        if scoring.desc_fusion:
            made["pred_score_desc_fusion"] = scoring.desc_fusion
        if own_failures:
            made["pred_score_failures"] = dict(sorted(own_failures.items()))
        scored.append({**line, "pred": kept, **made})
    _refuse_if_none_can_be_scored(lines, failures)
    return scored, failures


def usual_scoring(directory: Path) -> Scoring:
    """Of an inference run: the expected IoU where all its objects are boxes whose distributions are on record.

    Elsewhere log-probabilities: for answers in numbers, polygons, and backends that show no distributions.
    """
    lines = read_jsonl_lines(directory / GT_VS_PRED, _LINE_KEYS)
    traces = with_distributions(directory, read_jsonl_lines(directory / TOKEN_TRACE, TRACE_KEYS))
    is_usual = all(map(allows_expected_iou, lines, traces)) and any(COORD_DISTRIBUTIONS in t for t in traces)
    return Scoring("expected_iou" if is_usual else "logprob")


def allows_expected_iou(line: Mapping[str, Any], trace: Mapping[str, Any]) -> bool:
    """Whether all objects of an image are boxes, and what their coordinates were read from is on record."""
    return not lacks_distributions(trace) and all(len(obj["points"]) == 4 for obj in line["pred"])


def score_directory(directory: Path, scoring: Scoring | None = None) -> Counter[str]:
    """Read the two files of an inference run and write `gt_vs_pred_scored.jsonl` beside them.

    scoring: None takes `usual_scoring`.
    """
    scoring = scoring or usual_scoring(directory)
    lines = read_jsonl_lines(directory / GT_VS_PRED, _LINE_KEYS)
    traces = read_jsonl_lines(directory / TOKEN_TRACE, TRACE_KEYS)
    if scoring.method == "expected_iou":
        traces = with_distributions(directory, traces)
    try:
        scored, failures = score_lines(lines, traces, scoring)
    except RecordError as error:
        raise RecordError(f"{directory}: {error}") from None
    write_jsonl(directory / SCORED, scored)
    return failures


def _neighbours(positions: Sequence[int]) -> list[list[int]]:
    """Ascending positions in runs without a gap."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def form_of_trace(trace: Mapping[str, Any]) -> AnswerForm:
    """The form of a traced answer; RecordError for one that this release does not know."""
    try:
        return form_of(trace.get(ANSWER_FORM, "coordjson"))
    except ConfigError as error:
        raise RecordError(f"image {trace['image_id']}: {error}") from None


def _tokens_at(positions: Sequence[int], trace: Mapping[str, Any]) -> list[str] | ScoreFailure:
    tokens = trace["generated_token_text"]
    if not positions:
        return ScoreFailure.MISSING_POSITIONS
    if max(positions) >= len(tokens) or min(positions) < 0:
        return ScoreFailure.POSITION_OUT_OF_RANGE
    return [tokens[p] for p in positions]


def mean_logprob(positions: Sequence[int], logprobs: Sequence[float | None]) -> float | ScoreFailure:
    """Mean log-probability of the tokens at these positions, at most 0, or why there is none."""
    if not logprobs:
        return ScoreFailure.MISSING_LOGPROBS
    values = [value for p in positions if (value := logprobs[p]) is not None and math.isfinite(value)]
    if len(values) < len(positions):
        return ScoreFailure.NONFINITE_LOGPROB
    if max(values) > 1e-6:
        return ScoreFailure.POSITIVE_LOGPROB
    return min(0.0, float(sum(values)) / len(values))


def mean_coord_logprob(
    positions: Sequence[int], logprobs: Sequence[float | None], *, num_coords: int
) -> float | ScoreFailure:
    """Mean over an object's coordinates of the log-probability of all tokens that write one, or why there is none.

    positions: of all these tokens.
    """
    mean = mean_logprob(positions, logprobs)
    return mean if isinstance(mean, ScoreFailure) else mean * len(positions) / num_coords


def _is_written_by(desc: str, tokens: Sequence[str]) -> bool:
    """Whether the tokens hold the description; one with JSON escapes may be spelled in several ways."""
    text = b"".join(map(token_bytes, tokens)).decode("utf-8", errors="replace")
    return desc in canonical_desc(text) or "\\" in text


def _check_same_images(lines: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]]) -> None:
    if len(lines) != len(traces):
        raise RecordError(f"{GT_VS_PRED} has {len(lines)} lines, {TOKEN_TRACE} {len(traces)}; {_SAME_RUN}.")
    for number, (line, trace) in enumerate(zip(lines, traces, strict=True), start=1):
        for key in ("image_id", "image"):
            if key in trace and line[key] != trace[key]:
                raise RecordError(
                    f"line {number}: {key} is {line[key]!r} in {GT_VS_PRED} and {trace[key]!r} in {TOKEN_TRACE}; "
                    f"{_SAME_RUN}."
                )


def _check_alignment(line: Mapping[str, Any], trace: Mapping[str, Any], scoring: Scoring) -> None:
    """RecordError unless the trace is that of the line's answer, with one log-probability per token (or none)."""
    where = f"image {line['image_id']}"
    check_pixels(dict(line), where)
    num_tokens, num_logprobs = len(trace["generated_token_text"]), len(trace["token_logprobs"])
    if num_logprobs not in (0, num_tokens):
        raise RecordError(
            f"{where}: {num_tokens} tokens but {num_logprobs} log-probabilities in {TOKEN_TRACE}; run `coordexp infer` "
            "again."
        )
    positions = trace["object_token_positions"]
    if len(positions) != len(line["pred"]):
        raise RecordError(
            f"{where}: {len(line['pred'])} predictions but {len(positions)} traced objects; {_SAME_RUN}."
        )
    answer = line.get("raw_output_json")
    if answer is not None and "text" in trace and form_of_trace(trace).strict_json(trace["text"]) != answer:
        raise RecordError(
            f"{where}: {GT_VS_PRED} holds the answer {_shown(answer)}, {TOKEN_TRACE} another one "
            f"({_shown(trace['text'])}); {_SAME_RUN}."
        )
    if (scoring.desc_fusion or scoring.method == "expected_iou") and len(trace.get(_DESC_KEY, ())) != len(
        positions
    ):
        raise RecordError(
            f"{where}: {TOKEN_TRACE} has no {_DESC_KEY} for every object, which these scores need; run "
            "`coordexp infer` again, or score without it."
        )


def _refuse_if_none_can_be_scored(lines: Sequence[dict[str, Any]], failures: Counter[str]) -> None:
    num_pred = sum(len(line["pred"]) for line in lines)
    if num_pred and failures[ScoreFailure.MISSING_DISTRIBUTION] == num_pred:
        raise RecordError(
            f"no answer has distributions of its coordinates, neither in {TOKEN_TRACE} nor in {DISTRIBUTIONS}; "
            "`coordexp score --method expected_iou` makes the latter."
        )
    if num_pred and failures[ScoreFailure.MISSING_LOGPROBS] == num_pred:
        raise RecordError(
            "no answer has log-probabilities (a server that gives none?), so nothing can be scored; `coordexp score "
            "--constant` gives every prediction 1.0."
        )


def _shown(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
