"""An evaluation of the counted rollouts, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from codec_tokenizers import encode
from support.counted_rollouts import (
    CAT,
    CUT,
    DOG,
    NO_AP,
    NO_GEOMETRY,
    OUTCOMES,
    RED,
    TAIL,
    TOK,
    box,
    image_of,
    mask_iou_of_red,
    outcome,
)

from coordexp.codec.forms.choose import form_of
from coordexp.config.schema.rollout import EvalDetection, RolloutMatching
from coordexp.eval.on_policy import AnswerCounts, on_policy_numbers
from coordexp.matching import match_objects
from coordexp.metrics import keys_rollout
from coordexp.metrics.catalog import lookup
from coordexp.rollout.types import Rollout
from coordexp.targets import DroppedSample
from coordexp.telemetry.desc_monitor import DescCounts
from coordexp.trainers.rollouts.eval_metrics import detection_metrics, eval_metrics
from coordexp.trainers.rollouts.metrics import (
    RolloutOutcome,
)

WITH_AP = RolloutMatching.model_validate({"backend": "hf", "eval_detection": {"enabled": True}})


IMAGES = [
    image_of(found, gts, index)
    for index, (found, gts) in enumerate(
        zip(OUTCOMES, ([RED, CAT], [CAT], [CAT], [DOG, RED], [box("Cat", 1, 2, 3, 4)]), strict=True)
    )
]


def test_every_number_of_an_evaluation():
    iou = mask_iou_of_red()
    metrics = eval_metrics(IMAGES, WITH_AP, desc=DescCounts(3, 2, 3, 3, 3, 2.7, True))
    assert metrics.pop("rollout/matched_maskiou_mean") == pytest.approx((iou + 2) / 3, abs=0.005)
    # Of three cats two are found: 67 of 101 recall points. Of two red boxes one, with IoU 0.9502: 51 of 101.
    # Nobody found the dog or the Cat.
    assert metrics.pop("rollout/mAP") == pytest.approx((67 / 101 + 51 / 101 + 0 + 0) / 4)
    assert metrics == pytest.approx(
        {
            "rollout/precision": 3 / 4,  # here the match behind leading text counts
            "rollout/recall": 3 / 7,
            "rollout/f1": 6 / 11,
            "rollout/pred_objects": 4,
            "rollout/gt_objects": 7,
            "rollout/matched": 3,
            "rollout/fp": 1,
            "rollout/fn": 4,
            "rollout/parse_truncated_rate": 1 / 5,
            "rollout/parse_dropped_invalid": 2,
            "rollout/parse_dropped_ambiguous": 0,
            "rollout/duplicate_rate_mean": 0,
            "rollout/duplicate_rate_p99": 0,
            "rollout/sample_valid_pred_rate": 3 / 5,
            "rollout/sample_any_match_rate": 3 / 5,
            "rollout/coco_eval_ok": 1,
            "rollout/desc_pairs_total": 3,
            "rollout/desc_exact_acc_on_matched": 2 / 3,
            "rollout/desc_sem_enabled": 1,
            "rollout/desc_sem_acc_on_matched": 1,
            "rollout/desc_sem_sim_mean": 0.9,
            "rollout/desc_sem_sim_count": 3,
        }
    )
    assert all(lookup("eval_" + key) for key in metrics)


@pytest.mark.parametrize("cut", range(6))
def test_counts_of_two_ranks_add_up(cut):
    parts = [
        sum(map(AnswerCounts.of, images), AnswerCounts()) for images in (IMAGES[:cut], IMAGES[cut:], IMAGES)
    ]
    assert parts[0] + parts[1] == parts[2]


def test_an_evaluation_says_what_the_predictions_file_of_the_same_answers_says():
    metrics = eval_metrics(IMAGES, NO_AP)
    numbers = on_policy_numbers([replace(image, match=None) for image in IMAGES], gate=0.3)
    assert [numbers[f"rollout_{name}"] for name in ("precision", "recall", "f1")] == [
        metrics[f"rollout/{name}"] for name in ("precision", "recall", "f1")
    ]
    assert (numbers["parse_rate"], numbers["answer_rate"]) == (4 / 6, 3 / 5)
    assert numbers["bin_error"] == pytest.approx((2 + 2 + 10 + 2) / 4 / 3)


def test_empty_sets():
    nothing = eval_metrics([], NO_AP)
    assert [nothing[f"rollout/{name}"] for name in ("precision", "recall", "f1")] == [1, 1, 1]
    assert "rollout/parse_truncated_rate" not in nothing
    silent = eval_metrics([image_of(outcome("ask: ", '{"objects": []}', [CAT]), [CAT])], NO_AP)
    assert [silent[f"rollout/{name}"] for name in ("precision", "recall", "f1")] == [1, 0, 0]
    noisy = eval_metrics([image_of(outcome("ask: ", CUT + TAIL, []), [])], NO_AP)
    assert [noisy[f"rollout/{name}"] for name in ("precision", "recall", "f1")] == [0, 1, 0]


@pytest.mark.parametrize(("logprob", "expected"), [(-0.9, 1.0), (-0.1, 0.5)])
def test_average_precision_ranks_by_the_probability_of_the_coordinates(logprob, expected):
    """Two predictions of one class; the false one costs nothing where it is less sure than the true one."""
    right = image_of(outcome("ask: ", CUT + TAIL, [CAT], logprob=-0.5), [CAT])
    assert right.pred.rows(scored=True) == [
        {
            "type": "bbox_2d", "desc": "cat", "score": pytest.approx(math.exp(-0.5)),
            "points": pytest.approx([500, 501 * 499 / 999, 900, 901 * 499 / 999]),
        }
    ]  # fmt: skip
    wrong = image_of(outcome("ask: ", CUT + TAIL, [], logprob=logprob), [], image_id=1)
    metrics = eval_metrics([right, wrong], WITH_AP)
    assert (metrics["rollout/mAP"], metrics["rollout/coco_eval_ok"]) == (pytest.approx(expected), 1.0)


def test_answers_without_log_probabilities_all_score_one():
    found = outcome("ask: ", CUT + TAIL, [CAT])
    silent = replace(found, rollout=replace(found.rollout, token_logprobs=()))
    assert image_of(silent, [CAT]).pred.scores_N.tolist() == [1.0]


def test_a_box_of_numbers_is_scored_by_all_its_digits():
    """12 digits are 12 tokens; each coordinate has the log-probability of its three."""
    ids = encode(TOK, '[{"bbox_2d": [100, 200, 300, 400], "label": "cat"}]')
    parsed = form_of("qwen").parse(ids, TOK)
    rollout = Rollout((), tuple(ids), (-0.1,) * len(ids), "stop", 0.1)
    found = RolloutOutcome(rollout, parsed, match_objects(parsed.objects, []), 0, DroppedSample("", "", ""))
    assert image_of(found, []).pred.scores_N.tolist() == pytest.approx([math.exp(-0.1 * 12 / 4)])


def test_scores_may_be_left_out():
    """By score the sure and false box comes first; with equal scores the order is that of the images."""
    right = image_of(outcome("ask: ", CUT + TAIL, [CAT], logprob=-0.9), [CAT])
    wrong = image_of(outcome("ask: ", CUT + TAIL, [], logprob=-0.1), [], image_id=1)
    ap = {
        mode: detection_metrics([right, wrong], EvalDetection(enabled=True, score_mode=mode))["rollout/mAP"]
        for mode in ("logprob", "constant")
    }
    assert ap == pytest.approx({"logprob": 0.5, "constant": 1.0})


@pytest.mark.parametrize(
    ("response", "f1"),
    [
        (CUT + TAIL, (1, 1)),
        (CUT + ', {"desc": "do', (1, 0)),  # cut off
        (CUT + ", " + NO_GEOMETRY + TAIL, (1, 0)),  # a broken object
        ("I see nothing<|im_end|>", (0, 0)),  # no container
        (f"Sure: {CUT}{TAIL}", (1, 1)),  # text before a whole answer
    ],
)
def test_broken_answers_may_count_as_empty(response, f1):
    image = image_of(outcome("ask: ", response, [CAT]), [CAT])
    modes = [EvalDetection(enabled=True, metrics="both", strict_parse=strict) for strict in (False, True)]
    found = [detection_metrics([image], mode) for mode in modes]
    assert tuple(metrics["rollout/f1_50_95"] for metrics in found) == f1
    assert tuple(metrics["rollout/mAP"] for metrics in found) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("coco", {"rollout/mAP": 0.5, "rollout/coco_eval_ok": 1.0}),
        ("f1", {"rollout/f1_50_95": 2 / 3, "rollout/coco_eval_ok": 1.0}),
        ("both", {"rollout/mAP": 0.5, "rollout/f1_50_95": 2 / 3, "rollout/coco_eval_ok": 1.0}),
    ],
)
def test_which_detection_metrics_are_reported(wanted, expected):
    right = image_of(outcome("ask: ", CUT + TAIL, [CAT], logprob=-0.5), [CAT])
    wrong = image_of(outcome("ask: ", CUT + TAIL, [], logprob=-0.1), [], image_id=1)
    settings = EvalDetection(enabled=True, metrics=wanted)
    assert detection_metrics([right, wrong], settings) == pytest.approx(expected)
    assert set(expected) == set(keys_rollout.EVALUATION_DETECTION[wanted])
    failed = detection_metrics([wrong], settings)  # nothing is annotated
    assert failed == {key: 0.0 for key in expected if key != "rollout/f1_50_95"}


def test_a_failed_coco_evaluation_is_reported_not_raised(caplog):
    image = image_of(outcome("ask: ", CUT + TAIL, [CAT], logprob=math.nan), [CAT])
    metrics = eval_metrics([image], WITH_AP)
    assert (metrics["rollout/mAP"], metrics["rollout/coco_eval_ok"]) == (0.0, 0.0)
    assert "rollout/mAP is reported as 0" in caplog.text
