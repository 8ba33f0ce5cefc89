"""Confidences from token log-probabilities: the value, the alignment checks, every reason to have none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import GT_VS_PRED, SCORED, TOKEN_TRACE
from coordexp.eval.predictions.confidence import (
    LineScorer,
    ScoreFailure,
    Scoring,
    score_directory,
    score_lines,
    usual_scoring,
)
from coordexp.files import write_jsonl

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


def score_of(obj, traced, scoring=None):
    """Of the only object of a line."""
    return LineScorer(line(pred=[obj]), traced, scoring or Scoring()).score(0)


def test_score_is_the_geometric_mean_probability_of_the_coordinates():
    assert score_of(BOX, trace()) == pytest.approx(math.exp(-0.25))


@pytest.mark.parametrize(("weight", "mean"), [(0.0, -0.25), (0.5, -0.625), (0.2, -0.4), (1.0, -1.0)])
def test_desc_fusion_is_a_weighted_geometric_mean(weight, mean):
    # "cat" is written by two tokens of mean log-probability -1.0, the box by four of mean -0.25.
    tokens = ["c", "at", *TOKENS]
    fused = trace(
        generated_token_text=tokens,
        token_logprobs=[-0.4, -1.6, *LOGPROBS],
        object_token_positions=[[p + 2 for p in POSITIONS]],
        object_desc_token_positions=[[0, 1]],
    )
    assert score_of(BOX, fused, Scoring(desc_fusion=weight)) == pytest.approx(math.exp(mean))


def test_descriptions_are_compared_as_bytes_of_tokens():
    # "déjà" in byte-level BPE, cut inside a character.
    tokens = ["dÃ", "©j", "Ã", "\u0142"]  # U+0142 is the symbol of byte 0xA0
    obj = {**BOX, "desc": "déjà"}
    fused = trace(
        generated_token_text=[*TOKENS, *tokens],
        token_logprobs=[-1.0] * 13,
        object_desc_token_positions=[[9, 10, 11, 12]],
    )
    assert score_of(obj, fused, Scoring(desc_fusion=0.5)) == pytest.approx(math.exp(-1.0))
    assert score_of(BOX, fused, Scoring(desc_fusion=0.5)) is ScoreFailure.DESC_MISMATCH


@pytest.mark.parametrize(
    ("positions", "changes", "reason"),
    [
        ([1, 3, 5, 9], {}, ScoreFailure.POSITION_OUT_OF_RANGE),  # beyond the last token
        ([], {}, ScoreFailure.MISSING_POSITIONS),
        ([1, 3, 5, 8], {}, ScoreFailure.TOKEN_MISMATCH),  # not a coordinate
        ([3, 1, 5, 7], {}, ScoreFailure.TOKEN_MISMATCH),  # the right tokens in the wrong order
        ([1, 3, 5], {}, ScoreFailure.TOKEN_MISMATCH),  # too few
        (POSITIONS, {"token_logprobs": []}, ScoreFailure.MISSING_LOGPROBS),
        (POSITIONS, {"token_logprobs": [math.nan] * 9}, ScoreFailure.NONFINITE_LOGPROB),
        (POSITIONS, {"token_logprobs": [-math.inf] * 9}, ScoreFailure.NONFINITE_LOGPROB),
        (POSITIONS, {"token_logprobs": [None] * 9}, ScoreFailure.NONFINITE_LOGPROB),
        (POSITIONS, {"token_logprobs": [0.3] * 9}, ScoreFailure.POSITIVE_LOGPROB),
    ],
)
def test_reasons_for_no_score(positions, changes, reason):
    assert score_of(BOX, trace(object_token_positions=[positions], **changes)) is reason


def test_objects_without_a_score_are_left_out_and_counted():
    lines = [line(pred=[BOX, BOX])]
    scored, failures = score_lines(lines, [trace(object_token_positions=[POSITIONS, [0, 3, 5, 7]])])
    assert [obj["score"] for obj in scored[0]["pred"]] == [pytest.approx(math.exp(-0.25))]
    assert failures == {"token_mismatch": 1}
    assert scored[0]["pred_score_version"] == 1
    assert scored[0]["pred_score_failures"] == {"token_mismatch": 1}


def test_the_weight_of_a_fused_score_is_written_down():
    traced = trace(object_desc_token_positions=[[0]], generated_token_text=["cat", *TOKENS[1:]])
    [scored], _ = score_lines([line()], [traced], Scoring(desc_fusion=0.25))
    assert scored["pred_score_source"] == "coord_and_desc_token_logprob_mean_exp"
    assert scored["pred_score_desc_fusion"] == 0.25
    with pytest.raises(RecordError, match="object_desc_token_positions"):
        score_lines([line()], [trace()], Scoring(desc_fusion=0.25))
    with pytest.raises(ConfigError, match=r"1.5: expected a weight"):
        Scoring(desc_fusion=1.5)


def test_answers_without_log_probabilities():
    traced = trace(token_logprobs=[])
    with pytest.raises(RecordError, match=r"no answer has log-probabilities .*--constant"):
        score_lines([line()], [traced])
    [scored], failures = score_lines([line()], [traced], Scoring("constant"))
    assert [obj["score"] for obj in scored["pred"]] == [1.0]
    assert (scored["pred_score_source"], failures) == ("constant", {})


ANSWER = '{"objects": [{"desc": "cat", "bbox_2d": [<|coord_10|>, <|coord_20|>, <|coord_30|>, <|coord_40|>]}]}'
STRICT = '{"objects": [{"desc": "cat", "bbox_2d": [10, 20, 30, 40]}]}'


@pytest.mark.parametrize(
    ("lines", "traces", "message"),
    [
        ([line()], [trace(image_id=5)], r"line 1: image_id is 0 in .* and 5 in"),
        ([line()], [trace(image="b.png")], r"line 1: image is 'a.png' in .* and 'b.png' in"),
        ([line(), line(image_id=1)], [trace()], r"has 2 lines, .* 1;"),
        ([line(pred=[BOX, BOX])], [trace()], r"image 0: 2 predictions but 1 traced objects"),
        (
            [line(raw_output_json=STRICT)],
            [trace(text=ANSWER.replace("coord_40", "coord_41"))],
            r"image 0: .* holds the answer .* another one .*coord_41",
        ),
    ],
)
def test_a_trace_of_another_run_is_refused_naming_the_mismatch(lines, traces, message):
    with pytest.raises(RecordError, match=message) as caught:
        score_lines(lines, traces)
    assert "same `coordexp infer` run" in str(caught.value)


def test_the_trace_of_the_same_answer_is_taken():
    _, failures = score_lines([line(raw_output_json=STRICT)], [trace(text=ANSWER)])
    assert failures == {}


def test_a_trace_must_have_one_log_probability_per_token():
    with pytest.raises(RecordError, match="image 0: 9 tokens but 8 log-probabilities"):
        score_lines([line()], [trace(token_logprobs=LOGPROBS[:-1])])


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


def traced_box(**changes):
    """The box with a distribution at each coordinate; x2 is 30 or 50 with equal chance."""
    entry = {
        "positions": [p + 2 for p in POSITIONS],
        "mass": [1.0] * 4,
        "bins": [[10], [20], [30, 50], [40]],
        "weights": [[1.0], [1.0], [0.5, 0.5], [1.0]],
    }
    return trace(
        generated_token_text=["c", "at", *TOKENS],
        token_logprobs=[-0.4, -0.6, *LOGPROBS],
        object_token_positions=[[p + 2 for p in POSITIONS]],
        object_desc_token_positions=[[0, 1]],
        coord_distributions=entry,
        **changes,
    )


def test_expected_iou_times_the_probability_of_the_description():
    # 20 x 20 against itself and against 40 x 20: (1 + 1/2) / 2; the description has exp(-0.4 - 0.6)
    scoring = Scoring("expected_iou")
    assert score_of(BOX, traced_box(), scoring) == pytest.approx(0.75 * math.exp(-1.0), abs=1e-3)
    [scored], failures = score_lines([line()], [traced_box()], scoring)
    assert scored["pred_score_source"] == "expected_iou_times_desc_probability"
    assert not failures


@pytest.mark.parametrize(
    ("pred", "lacks", "expected"),
    [
        ([BOX], (), "expected_iou"),
        ([BOX], ("coord_distributions",), "logprob"),  # answers of vLLM or a server
        ([{"type": "poly", "points": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], "desc": "cat"}], (), "logprob"),
        ([], ("generated_token_text", "coord_distributions"), "logprob"),  # nothing was answered
    ],
)
def test_the_usual_score_is_the_expected_iou_where_it_can_be(tmp_path: Path, pred, lacks, expected):
    traced = {**traced_box(), **{key: [] for key in lacks if key == "generated_token_text"}}
    if "coord_distributions" in lacks:
        del traced["coord_distributions"]
    write_jsonl(tmp_path / GT_VS_PRED, [line(pred=pred)])
    write_jsonl(tmp_path / TOKEN_TRACE, [traced])
    assert usual_scoring(tmp_path) == Scoring(expected)


def test_expected_iou_names_what_it_lacks():
    scoring = Scoring("expected_iou")
    without = traced_box()
    del without["coord_distributions"]
    assert score_of(BOX, without, scoring) is ScoreFailure.MISSING_DISTRIBUTION
    with pytest.raises(RecordError, match="score --method expected_iou"):
        score_lines([line()], [without], scoring)
    torn = traced_box()
    torn["coord_distributions"]["bins"].pop()
    with pytest.raises(RecordError, match="of one length"):
        score_lines([line()], [torn], scoring)
    with pytest.raises(ConfigError, match="ask for nothing beside it"):
        Scoring("expected_iou", desc_fusion=0.5)
    polygon = {"type": "poly", "points": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0], "desc": "cat"}
    tokens = [f"<|coord_{k}|>" for k in (10, 20, 30, 40, 50, 60)]
    of_polygon = traced_box() | {
        "generated_token_text": ["c", "at", *tokens],
        "token_logprobs": [-0.1] * 8,
        "object_token_positions": [list(range(2, 8))],
    }
    assert score_of(polygon, of_polygon, scoring) is ScoreFailure.NOT_A_BOX


# Qwen's own form: 501 is bin 500, and a digit is a token.
NUMBER_BOX = {"type": "bbox_2d", "points": [10.0, 20.0, 499.0, 500.0], "desc": "cat"}
NUMBER_TOKENS = [*"[10", ",", *"20", ",", *"499", ",", *"501", "]"]
NUMBER_POSITIONS = [1, 2, 4, 5, 7, 8, 9, 11, 12, 13]


def test_a_number_has_the_probability_of_all_its_digits():
    logprobs = [0.0] * len(NUMBER_TOKENS)
    for position, value in zip(
        NUMBER_POSITIONS, (-0.1, -0.2, -0.3, 0.0, -0.4, -0.5, 0.0, -0.5, 0.0, 0.0), strict=True
    ):
        logprobs[position] = value
    traced = trace(
        generated_token_text=NUMBER_TOKENS, token_logprobs=logprobs, object_token_positions=[NUMBER_POSITIONS],
        answer_form="qwen",
    )  # fmt: skip
    assert score_of(NUMBER_BOX, traced) == pytest.approx(math.exp((-0.3 - 0.3 - 0.9 - 0.5) / 4))
    scored, failures = score_lines([line(pred=[NUMBER_BOX])], [traced])
    assert (scored[0]["pred_score_source"], failures) == ("coord_number_logprob_mean_exp", {})
    other = score_of(NUMBER_BOX, {**traced, "answer_form": "coordjson_numbers"})  # 501 is bin 501 there
    assert other is ScoreFailure.TOKEN_MISMATCH
    with pytest.raises(RecordError, match="answer form 'yaml'"):
        score_of(NUMBER_BOX, {**traced, "answer_form": "yaml"})
