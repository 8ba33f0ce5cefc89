"""Which numbers may pick the best checkpoint, in which direction, and which evaluations count."""

from __future__ import annotations

import itertools

import pytest

from coordexp.config import Sections, parse_sections
from coordexp.metrics.best import BestMetric, choose_best_metric, evaluation_keys, why_not_best
from coordexp.metrics.catalog import all_specs, lookup

PIPELINE = {
    "objective": [
        {
            "name": "bbox_geo",
            "enabled": True,
            "weight": 1.0,
            "channels": ["B"],
            "config": {"smoothl1_weight": 1.0, "ciou_weight": 1.0},
        }
    ]
}
STAGE1 = ("stage1_coord", Sections())
ALIGNED = (
    "stage2_rollout_aligned",
    parse_sections({"rollout_matching": {"backend": "hf", "pipeline": PIPELINE}}),
)


def test_stage_1_that_asks_the_model_is_judged_by_its_answers() -> None:
    asking = parse_sections(
        {"custom": {"rollout_eval": {"enabled": True, "eval_detection": {"enabled": True}}}}
    )
    assert choose_best_metric(None, None, "stage1_coord", asking) == BestMetric("rollout/f1", True)
    assert choose_best_metric("eval_loss", None, "stage1_coord", asking) == BestMetric("loss", False)
    assert choose_best_metric("rollout/mAP", None, "stage1_coord", asking) == BestMetric("rollout/mAP", True)
    with pytest.raises(ValueError, match="reports no such number"):
        choose_best_metric("rollout/f1", None, *STAGE1)


@pytest.mark.parametrize(
    ("key", "better"),
    [
        ("rollout/f1", "higher"),
        ("eval_rollout/f1", "higher"),
        ("rollout/precision", "higher"),
        ("rollout/mAP", "higher"),
        ("rollout/parse_truncated_rate", "lower"),
        ("rollout/fp", "lower"),
        ("rollout/pred_objects", None),
        ("eval_loss", "lower"),
        ("loss", "lower"),
        ("token_acc", "higher"),
        ("coord_diag/expected_bin_mae", "lower"),
        ("coord_diag/coord_vocab_mass", "higher"),
        ("coord_diag/coord_tokens", None),
        ("coord_diag/B/margin_mean", "lower"),
        ("loss/B_coord/bbox_ciou", "lower"),
        ("coord_monitor/flip_text_to_coord", "lower"),
        ("coord_monitor/coord_vocab_mass_at_gt_coord", "higher"),
        ("coord_monitor/coord_vocab_mass_at_gt_text", "lower"),
        ("time/rollout_generate_s", "lower"),
        ("train_samples_per_second", "higher"),
        ("learning_rate", None),
    ],
)
def test_direction_of_a_key(key: str, better: str | None) -> None:
    spec = lookup(key)
    assert spec is not None
    assert spec.better == better


def test_what_the_objective_minimises_is_better_when_lower() -> None:
    in_loss = [spec for spec in all_specs() if spec.in_loss]
    assert len(in_loss) > 30
    assert {spec.better for spec in in_loss} == {"lower"}


def test_defaults_of_the_variants() -> None:
    assert choose_best_metric(None, None, *STAGE1) == BestMetric("loss", greater_is_better=False)
    assert choose_best_metric(None, None, *ALIGNED) == BestMetric("rollout/f1", greater_is_better=True)


def test_the_direction_comes_from_the_catalogue() -> None:
    """By name alone the greatest rate of truncated answers would be taken for the best."""
    chosen = choose_best_metric("eval_rollout/parse_truncated_rate", None, *ALIGNED)
    assert chosen == BestMetric("rollout/parse_truncated_rate", greater_is_better=False)
    assert chosen.logged_as == "eval_rollout/parse_truncated_rate"


@pytest.mark.parametrize(
    ("asked_for", "greater", "run", "said"),
    [
        ("rollout/parse_truncated_rate", True, ALIGNED, "better when lower, but greater_is_better is true"),
        ("rollout/f1", False, ALIGNED, "better when higher, but greater_is_better is false"),
        (None, False, ALIGNED, "rollout/f1 is better when higher"),
        (None, True, STAGE1, "loss is better when lower"),
        ("rollout/gt_objects", None, ALIGNED, "neither more nor less of it is better. Expected one of "),
        ("rollout/f1", None, STAGE1, "the evaluation of trainer variant stage1_coord reports no such number"),
        ("loss", None, ALIGNED, "variant stage2_rollout_aligned reports no such number"),
        ("rollout/mAP", None, ALIGNED, "reports no such number"),  # without eval_detection
        ("rollout/precison", None, ALIGNED, "Did you mean rollout/precision?"),
    ],
)
def test_what_is_refused(asked_for, greater, run, said) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        choose_best_metric(asked_for, greater, *run)
    assert said in str(caught.value)


def test_what_evaluation_reports_depends_on_its_switches() -> None:
    for coco, descs in itertools.product((False, True), repeat=2):
        sections = parse_sections(
            {"rollout_matching": {"eval_detection": {"enabled": coco}, "desc_monitor": {"enabled": descs}}}
        )
        keys = evaluation_keys("stage2_two_channel", sections)
        assert ("rollout/mAP" in keys, "rollout/desc_exact_acc_on_matched" in keys) == (coco, descs)
    by_f1 = parse_sections({"rollout_matching": {"eval_detection": {"enabled": True, "metrics": "f1"}}})
    keys = evaluation_keys("stage2_two_channel", by_f1)
    assert ("rollout/mAP" in keys, "rollout/f1_50_95" in keys) == (False, True)
    assert choose_best_metric("rollout/f1_50_95", None, "stage2_two_channel", by_f1).greater_is_better
    typed = parse_sections({"custom": {"token_type_metrics": {"enabled": True}}})
    assert "desc_token_acc" in evaluation_keys("stage1_coord", typed)
    assert "desc_token_acc" not in evaluation_keys(*STAGE1)


@pytest.mark.parametrize(
    ("key", "evaluation", "reason"),
    [
        ("rollout/f1", {"eval_rollout/f1": 0.5, "eval_rollout/pred_objects": 3}, None),
        ("rollout/f1", {"eval_loss": 1.0}, "it reported no eval_rollout/f1"),
        (
            "rollout/precision",
            {"eval_rollout/precision": 1.0, "eval_rollout/pred_objects": 0},
            "the model predicted no object at all",
        ),
        (
            "rollout/mAP",
            {"eval_rollout/mAP": 0.0, "eval_rollout/coco_eval_ok": 0.0, "eval_rollout/pred_objects": 3},
            "COCO evaluation failed",
        ),
        ("rollout/f1", {"eval_rollout/f1": 0.5, "eval_rollout/coco_eval_ok": 0.0}, None),
        ("loss", {"eval_loss": 1.0}, None),
    ],
)
def test_which_evaluations_count(key: str, evaluation: dict[str, float], reason: str | None) -> None:
    assert why_not_best(BestMetric(key, greater_is_better=True), evaluation) == reason


def test_numbers_of_a_data_set_may_pick_the_best_checkpoint():
    fusion = {"sources": [{"name": "lvis", "train_jsonl": "a", "val_jsonl": "b", "weight": 1.0},
                          {"name": "o365", "train_jsonl": "c", "weight": 1.0}]}  # fmt: skip
    custom = {"custom": {"fusion": fusion}}
    stage1 = ("stage1_coord", parse_sections(custom))
    aligned = (
        ALIGNED[0],
        parse_sections({"rollout_matching": {"backend": "hf", "pipeline": PIPELINE}, **custom}),
    )
    assert choose_best_metric("eval_dataset/lvis/rollout/f1", None, *aligned).greater_is_better
    assert not choose_best_metric("dataset/lvis/loss", None, *stage1).greater_is_better
    for name, (variant, sections) in {
        "dataset/o365/loss": stage1,
        "dataset/lvis/rollout/mAP": aligned,
    }.items():
        with pytest.raises(ValueError, match="reports no such number"):  # no validation records; mAP is off
            choose_best_metric(name, None, variant, sections)
