"""Confidences from token log-probabilities: the value, the alignment checks, every reason to have none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coordexp.errors import RecordError
from coordexp.eval.artifacts import GT_VS_PRED, SCORED, TOKEN_TRACE, write_jsonl
from coordexp.eval.confidence import ScoreFailure, object_score, score_directory, score_lines

# On a 1000 x 1000 image a bin is a pixel.
BOX = {"type": "bbox_2d", "points": [10.0, 20.0, 30.0, 40.0], "desc": "cat"}
TOKENS = ["[", "<|coord_10|>", ",", "<|coord_20|>", ",", "<|coord_30|>", ",", "<|coord_40|>", "]"]
LOGPROBS = [-0.5, -0.1, 0.0, -0.2, 0.0, -0.3, 0.0, -0.4, 0.0]
POSITIONS = [1, 3, 5, 7]


def trace(**changes):
    base = {
        "image_id": 0,
        "generated_token_text": TOKENS,
        "token_logprobs": LOGPROBS,
        "object_token_positions": [POSITIONS],
    }
    return {**base, **changes}


def line(**changes):
    base = {"image_id": 0, "image": "a.png", "width": 1000, "height": 1000, "coord_mode": "pixel", "gt": []}
    return {**base, "pred": [BOX], **changes}


def test_score_is_the_geometric_mean_probability_of_the_coordinates():
    assert object_score(BOX, POSITIONS, trace(), 1000, 1000) == pytest.approx(math.exp(-0.25))


@pytest.mark.parametrize(
    ("positions", "changes", "reason"),
    [
        ([1, 3, 5, 9], {}, ScoreFailure.POSITION_OUT_OF_RANGE),  # beyond the last token
        ([], {}, ScoreFailure.POSITION_OUT_OF_RANGE),  # no position recorded
        ([1, 3, 5, 8], {}, ScoreFailure.TOKEN_MISMATCH),  # not a coordinate
        ([3, 1, 5, 7], {}, ScoreFailure.TOKEN_MISMATCH),  # the right tokens in the wrong order
        (POSITIONS, {"token_logprobs": [math.nan] * 9}, ScoreFailure.NONFINITE_LOGPROB),
        (POSITIONS, {"token_logprobs": [None] * 9}, ScoreFailure.NONFINITE_LOGPROB),
    ],
)
def test_reasons_for_no_score(positions, changes, reason):
    assert object_score(BOX, positions, trace(**changes), 1000, 1000) is reason


def test_objects_without_a_score_are_left_out_and_counted():
    lines = [line(pred=[BOX, BOX])]
    scored, failures = score_lines(lines, [trace(object_token_positions=[POSITIONS, [0, 3, 5, 7]])])
    assert [obj["score"] for obj in scored[0]["pred"]] == [pytest.approx(math.exp(-0.25))]
    assert failures == {"token_mismatch": 1}
    assert scored[0]["pred_score_version"] == 1


@pytest.mark.parametrize(
    ("lines", "traces"),
    [
        ([line()], [trace(image_id=5)]),  # another image
        ([line()], []),  # a missing image
        ([line(pred=[BOX, BOX])], [trace()]),  # another number of objects
    ],
)
def test_files_of_different_runs_are_refused(lines, traces):
    with pytest.raises(RecordError, match="same `coordexp infer` run"):
        score_lines(lines, traces)


def test_score_directory_writes_the_scored_file(tmp_path: Path):
    write_jsonl(tmp_path / GT_VS_PRED, [line()])
    write_jsonl(tmp_path / TOKEN_TRACE, [trace()])
    assert score_directory(tmp_path) == {}
    [scored] = [json.loads(text) for text in (tmp_path / SCORED).read_text().splitlines()]
    assert scored["pred"][0]["score"] == pytest.approx(math.exp(-0.25))
    assert scored["pred_score_source"] == "coord_token_logprob_mean_exp"


def test_a_file_of_something_else_names_the_missing_keys(tmp_path: Path):
    (tmp_path / GT_VS_PRED).write_text('{"image_id": 0}\n')
    with pytest.raises(RecordError, match=r"gt_vs_pred.jsonl:1: lacks image, width"):
        score_directory(tmp_path)
