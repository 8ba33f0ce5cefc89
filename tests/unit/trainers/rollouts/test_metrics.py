"""Metrics of the counted rollouts, number by number; and of any way to split them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counted_rollouts import (
    CAT,
    CUT,
    EXACT_CAT,
    GREEDY,
    MIXED,
    NO_AP,
    OUTCOMES,
    SECONDS,
    TAIL,
    TAILS,
    flushed,
    image_of,
    mask_iou_of_red,
    num_tokens,
    outcome,
    written,
)

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.metrics import keys_rollout
from coordexp.metrics.catalog import lookup
from coordexp.metrics.spec import Kind, Reduce
from coordexp.targets import DroppedSample
from coordexp.trainers.rollouts.eval_metrics import eval_metrics
from coordexp.trainers.rollouts.metrics import (
    channel_b_metrics,
    packing_metrics,
    rollout_metrics,
)


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
