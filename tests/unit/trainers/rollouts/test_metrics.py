"""Metrics of four rollouts and one without a target, small enough to count by hand; and of any way to split them."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.config.schema.rollout import EvalDetection, RolloutMatching
from coordexp.data.raw_samples import RawSample
from coordexp.eval.on_policy import AnswerCounts, on_policy_numbers
from coordexp.matching import match_objects
from coordexp.metrics import keys_rollout
from coordexp.metrics.accumulate import MetricStore
from coordexp.metrics.catalog import lookup
from coordexp.metrics.spec import Kind, Reduce
from coordexp.rollout.types import Rollout
from coordexp.targets import DroppedSample, TargetBuilder
from coordexp.telemetry.desc_monitor import DescCounts
from coordexp.trainers.rollouts.answers import JudgedAnswer
from coordexp.trainers.rollouts.eval_metrics import detection_metrics, eval_metrics, image_result
from coordexp.trainers.rollouts.metrics import (
    RolloutOutcome,
    channel_b_metrics,
    packing_metrics,
    rollout_metrics,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "fixtures" / "codec"))

from codec_tokenizers import encode, with_added_tokens


def bytewise(normalizer=None):
    """A token per byte and per coordinate: the number of tokens of a text can be counted."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    return with_added_tokens(bpe)


TOK = bytewise()
LOWERCASING = bytewise(normalizers.Lowercase())


def box(desc, *bins):
    return BoxObject(desc, "bbox_2d", bins)


def written(desc, *bins):
    return f'{{"desc": "{desc}", "bbox_2d": [{", ".join(f"<|coord_{b}|>" for b in bins)}]}}'


def num_tokens(text):
    """Tokens of a text in the bytewise tokenizer, by counting characters."""
    return len(re.sub(r"<\|\w+\|>", "#", text))


def outcome(prompt, response, gts, tok=TOK, logprob=-0.5, **rollout):
    ids, prompt_ids = encode(tok, response), encode(tok, prompt)
    parsed = parse_rollout(ids, tok, allow_poly=False)
    match = match_objects(parsed.objects, gts)
    sample = TargetBuilder(tok).from_rollout(
        prompt_ids, parsed, match, gts, generation_prompt_ids=prompt_ids, sample_id="train.jsonl:3"
    )
    answer = Rollout(tuple(prompt_ids), tuple(ids), (logprob,) * len(ids), "stop", 0.1, **rollout)
    return RolloutOutcome(answer, parsed, match, len(gts), sample)


RED, CAT, DOG = box("red box", 10, 20, 300, 400), box("cat", 500, 501, 900, 901), box("dog", 0, 600, 90, 800)
NEAR_RED = written("red box", 12, 22, 310, 402)
FAR_DOG = written("dog", 700, 0, 800, 90)
EXACT_CAT = written("cat", 500, 501, 900, 901)
NO_GEOMETRY = '{"desc": "x"}'
POLYGON = (
    '{"desc": "p", "poly": ['
    + ", ".join(f"<|coord_{b}|>" for b in (500, 501, 900, 501, 900, 901, 500, 901))
    + "]}"
)
TAIL = "]}<|im_end|>"
MIXED = f'{{"objects": [{NEAR_RED}, {FAR_DOG}, {NO_GEOMETRY}, {POLYGON}'
CUT = f'{{"objects": [{EXACT_CAT}'

OUTCOMES = [
    # a match, a false positive, two dropped records, a miss
    outcome("ask: ", MIXED + TAIL, [RED, CAT]),
    # cut inside the second record; the match is exact and nothing is missed
    outcome("ask again: ", CUT + ', {"desc": "do', [CAT], repeat_terminated=True),
    # text before the container: the match counts, but the target starts from the empty container
    outcome("ask: ", f'Sure: {{"objects": [{EXACT_CAT}{TAIL}', [CAT]),
    # no container at all
    outcome("ask: ", "I see nothing<|im_end|>", [DOG, RED]),
    # the tokenizer changes what is appended, so there is no target
    outcome("ask: ", '{"objects": []}<|im_end|>', [box("Cat", 1, 2, 3, 4)], tok=LOWERCASING),
]
TAILS = [
    num_tokens(f", {EXACT_CAT}{TAIL}"),
    num_tokens(TAIL),
    num_tokens(EXACT_CAT + TAIL),
    num_tokens(f"{written('dog', *DOG.bins)}, {written('red box', *RED.bins)}{TAIL}"),
]
"""Lengths of what is appended to the first four."""
SECONDS = {"generate_s": 2.0, "parse_match_s": 0.5, "encode_s": 0.25}
GREEDY = RolloutMatching(backend="hf", decode_batch_size=2)


def flushed(*entry_groups):
    store = MetricStore(strict=True)
    for entries in entry_groups:
        store.add_all(entries)
    return store.flush()


def mask_iou_of_red():
    """maskIoU of NEAR_RED with RED on the default canvas, from the areas of the two boxes in bins."""
    inter = (300 - 12) * (400 - 22)
    return inter / (290 * 380 + 298 * 380 - inter)


def test_the_outcomes_are_what_they_are_meant_to_be():
    assert [len(o.match.matched) for o in OUTCOMES] == [1, 1, 1, 0, 0]
    assert [o.num_supervised for o in OUTCOMES] == [1, 1, 0, 0, 0]
    assert [isinstance(o.sample, DroppedSample) for o in OUTCOMES] == [False, False, False, False, True]


def test_every_number_of_a_step():
    metrics = flushed(rollout_metrics(OUTCOMES, GREEDY, **SECONDS))
    responses = [
        num_tokens(text)
        for text in (
            MIXED + "]}",
            CUT + ', {"desc": "do',
            f'Sure: {{"objects": [{EXACT_CAT}]}}',
            "I see nothing",
            '{"objects": []}',
        )
    ]
    empty = num_tokens('{"objects": [')
    targets = [p + t for p, t in zip((num_tokens(MIXED), num_tokens(CUT), empty, empty), TAILS, strict=True)]
    encoded = [prompt + target for prompt, target in zip((5, 11, 5, 5), targets, strict=True)]
    iou = metrics.pop("rollout/matched_maskiou_mean")
    assert iou == pytest.approx((mask_iou_of_red() + 1 + 1) / 3, abs=0.005)
    assert metrics == pytest.approx(
        {
            "time/rollout_generate_s": 2.0,
            "time/rollout_parse_match_s": 0.5,
            "time/rollout_teacher_encode_s": 0.25,
            "rollout/gen_new_tokens_total": sum(responses),
            "rollout/gen_new_tokens_mean": sum(responses) / 5,
            "rollout/gen_new_tokens_p90": np.percentile(responses, 90),
            "rollout/gen_new_tokens_p99": np.percentile(responses, 99),
            "rollout/gen_tokens_per_s": sum(responses) / 2.0,
            "rollout/do_sample": 0,
            "rollout/temperature": 0,
            "rollout/top_p": 1,
            "rollout/top_k": -1,
            "rollout/decode_non_beam_count": 5,
            "rollout/decode_beam_count": 0,
            "rollout/repeat_terminate_active": 0,
            "rollout/repeat_terminate_triggered_sequences": 1,
            "rollout/parse_dropped_invalid": 2,
            "rollout/parse_dropped_ambiguous": 0,
            "rollout/parse_truncated": 1,
            "rollout/parse_truncated_rate": 1 / 5,
            "rollout/parse_obj_total": 6,
            "rollout/parse_obj_valid_frac": 4 / 6,
            "rollout/parse_obj_drop_frac": 2 / 6,
            "rollout/duplicate_rate_mean": 0,
            "rollout/duplicate_rate_p99": 0,
            "rollout/sample_valid_pred_rate": 3 / 5,
            "rollout/sample_any_match_rate": 2 / 5,
            "rollout/gt_objects_total": 7,
            "rollout/valid_pred_objects_total": 4,
            "rollout/matched_for_supervision": 2,
            "rollout/excluded_from_supervision": 1,
            "rollout/excluded_rate": 1 / 3,
            "rollout/fn_appended_total": 1 + 0 + 1 + 2,
            "rollout/fn_total": 5,
            "rollout/gating_rejections": 3,  # red with cat; the dog with both
            "rollout/gating_rejection_rate": 3 / 6,
            "rollout/precision": 2 / 4,
            "rollout/recall": 2 / 7,
            "rollout/f1": 4 / 11,
            "rollout/matched_maskiou_count": 3,
            "rollout/prefix_coord_targets_total": 8,
            "rollout/prefix_coord_targets_per_matched": 4,
            "rollout/tail_ignore_frac": 0,
            "rollout/prompt_len_mean": (5 + 11 + 5 + 5 + 5) / 5,
            "rollout/prompt_len_p90": 5 + 0.6 * 6,  # between the 4th and the 5th of five
            "rollout/rollout_len_mean": sum(responses) / 5,
            "rollout/rollout_len_p90": np.percentile(responses, 90),
            "rollout/train_len_mean": sum(targets) / 4,
            "rollout/train_len_p90": np.percentile(targets, 90),
            "rollout/append_len_mean": sum(TAILS) / 4,
            "rollout/append_len_p90": np.percentile(TAILS, 90),
            "rollout/encoded_len_mean": sum(encoded) / 4,
            "rollout/encoded_len_p90": np.percentile(encoded, 90),
        }
    )


def test_duplicates_of_a_step_and_of_an_evaluation():
    # IoU with the first cat: 400 * 395 / 400^2 = 0.9875, 0.925, 360 / 400 = 0.9 exactly (not above); a dog is no cat.
    cats = [written("cat", 500, 501, 900, y2) for y2 in (901, 896, 871, 861)]
    repeats = ", ".join([*cats, written("dog", 500, 501, 900, 901)])
    five = outcome("ask: ", f'{{"objects": [{repeats}{TAIL}', [CAT])
    two = outcome("ask: ", f'{{"objects": [{EXACT_CAT}, {EXACT_CAT}{TAIL}', [CAT])
    silent = outcome("ask: ", "I see nothing<|im_end|>", [CAT])
    # The fourth cat repeats the third one (360 / 370) and the second.
    rates = [3 / 5, 1 / 2, 0]
    metrics = flushed(rollout_metrics([five, two, silent], GREEDY, **SECONDS))
    evaluated = eval_metrics(
        [image_of(found, [CAT], index) for index, found in enumerate((five, two, silent))], NO_AP
    )
    for found in (metrics, evaluated):
        assert found["rollout/duplicate_rate_mean"] == pytest.approx(sum(rates) / 3)
        assert found["rollout/duplicate_rate_p99"] == pytest.approx(
            0.5 + 0.98 * 0.1
        )  # between the largest two
    split = flushed(
        rollout_metrics([five], GREEDY, **SECONDS), rollout_metrics([two, silent], GREEDY, **SECONDS)
    )
    assert split["rollout/duplicate_rate_mean"] == pytest.approx(sum(rates) / 3)
    assert split["rollout/duplicate_rate_p99"] == pytest.approx(3 / 5)  # the largest of both steps


def test_every_training_key_of_the_catalogue_is_there():
    metrics = rollout_metrics(OUTCOMES, GREEDY, **SECONDS)
    expected = {
        spec.key
        for section in (keys_rollout.TIME, keys_rollout.ROLLOUT)
        for spec in section
        if spec.when == keys_rollout.WITH_ROLLOUT
    }
    assert set(metrics) == expected


def test_masked_descriptions_of_the_tail():
    metrics = flushed(rollout_metrics(OUTCOMES, GREEDY, **SECONDS, fn_desc_weight=0.0))
    masked = len("cat") + 0 + len("cat") + len("dog" + "red box")
    assert metrics["rollout/tail_ignore_frac"] == pytest.approx(masked / sum(TAILS))


def test_decoding_knobs():
    sampled = {
        "decoding": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        "repeat_terminate": {"enabled": True},
    }
    metrics = flushed(rollout_metrics(OUTCOMES, RolloutMatching.model_validate(sampled), **SECONDS))
    names = ("do_sample", "temperature", "top_p", "top_k", "repeat_terminate_active")
    assert [metrics[f"rollout/{name}"] for name in names] == pytest.approx([1, 0.7, 0.9, 20, 1])
    beams = RolloutMatching(backend="hf", decode_mode="beam", num_beams=3)
    metrics = flushed(rollout_metrics(OUTCOMES, beams, **SECONDS))
    names = ("do_sample", "decode_beam_count", "decode_non_beam_count")
    assert [metrics[f"rollout/{name}"] for name in names] == [0, 5, 0]


def test_channel_b_counters():
    assert flushed(channel_b_metrics(OUTCOMES)) == {
        "stage2/raw_rollouts": 5,
        "stage2_ab/channel_b/strict_drop/N_valid_pred": 4,
        "stage2_ab/channel_b/strict_drop/N_drop_invalid": 2,
        "stage2_ab/channel_b/strict_drop/reason/missing_geom": 1,
        "stage2_ab/channel_b/strict_drop/reason/poly_unsupported": 1,
        "stage2_ab/channel_b/closure_supervision/N_drop": 1,
        "stage2_ab/channel_b/invalid_rollout": 2,  # leading text, and no container
    }


def test_packing():
    metrics = flushed(packing_metrics([90, 60], 100, num_segments=5, buffer=1), packing_metrics([30], 100, 1))
    assert metrics == pytest.approx(
        {
            "packing/post_rollout_fill": 180 / 300,
            "packing/post_rollout_segments": 2.0,
            "packing/post_rollout_buffer": 2 / 3,
        }
    )


def test_nothing_without_rollouts():
    assert rollout_metrics([], GREEDY, **SECONDS) == {}
    assert channel_b_metrics([]) == {}
    assert packing_metrics([], 100, 0) == {}


def test_rates_over_nothing_are_absent():
    metrics = flushed(rollout_metrics(OUTCOMES[3:4], GREEDY, **SECONDS))
    for name in ("precision", "parse_obj_valid_frac", "gating_rejection_rate", "excluded_rate"):
        assert f"rollout/{name}" not in metrics
    assert "rollout/matched_maskiou_mean" not in metrics
    assert metrics["rollout/recall"] == 0
    without_target = flushed(rollout_metrics(OUTCOMES[4:], GREEDY, **SECONDS))
    assert "rollout/train_len_mean" not in without_target
    assert without_target["rollout/prompt_len_mean"] == 5


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_any_split_gives_the_same_rates_means_and_counters(parts):
    whole = flushed(rollout_metrics(OUTCOMES, GREEDY, **SECONDS), channel_b_metrics(OUTCOMES))
    groups = [[o for o, part in zip(OUTCOMES, parts, strict=True) if part == number] for number in range(4)]
    split = flushed(
        *(
            entries
            for group in groups
            for entries in (
                rollout_metrics(
                    group, GREEDY, generate_s=2.0 * len(group) / 5, parse_match_s=0.1, encode_s=0.1
                ),
                channel_b_metrics(group),
            )
        )
    )
    assert split.keys() == whole.keys()
    for key, value in split.items():
        spec = lookup(key)
        if spec.reduce is not Reduce.MAX and spec.kind is not Kind.PERCENTILE:
            assert value == pytest.approx(whole[key]), key


# evaluation

WITH_AP = RolloutMatching.model_validate({"backend": "hf", "eval_detection": {"enabled": True}})
NO_AP = RolloutMatching.model_validate({"backend": "hf", "eval_detection": {"enabled": False}})


def image_of(found: RolloutOutcome, gts, image_id=0):
    """What evaluation makes of an answer about an image of 1000 x 500 pixels."""
    sample = RawSample("train.jsonl:3", "", (), None, tuple(gts), (), (), 1000, 500)
    return image_result(image_id, JudgedAnswer(sample, found.rollout, found.parsed, found.match))


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
