"""A run's files must belong together: what does not is refused, and the message names what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordexp.errors import RecordError
from coordexp.eval.evaluate import check_baseline, evaluate, from_run, headline, with_baseline
from coordexp.eval.predictions.artifacts import GT_VS_PRED, RUN_META, SCORED, TOKEN_TRACE
from coordexp.eval.predictions.scored import recorded_image_root
from coordexp.files import write_jsonl


def obj(desc, *points, **more):
    return {"type": "bbox_2d", "points": [float(p) for p in points], "desc": desc, **more}


def unscored_line(image_id: int, **changes) -> dict:
    return {
        "image_id": image_id, "image": f"{image_id}.png", "width": 100, "height": 80, "coord_mode": "pixel",
        "gt": [obj("cat", 0, 0, 40, 40)],
        "pred": [obj("cat", 1, 0, 40, 40), obj("dog", 1, 1, 9, 9), obj("cat", 50, 50, 90, 70)],
        "errors": {}, **changes,
    }  # fmt: skip


def scored_line(unscored: dict) -> dict:
    pred = [{**o, "score": 0.5} for o in unscored["pred"]]
    return {**unscored, "pred": pred, "pred_score_source": "test", "pred_score_version": 1}


def write_run(folder: Path, scored: list[dict], unscored: list[dict] | None = None, traces=None) -> Path:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / SCORED, scored)
    if unscored is not None:
        write_jsonl(folder / GT_VS_PRED, unscored)
    if traces is not None:
        write_jsonl(folder / TOKEN_TRACE, traces)
    return folder


LINES = [unscored_line(image_id) for image_id in range(3)]
SCORED_LINES = [scored_line(line) for line in LINES]


def test_boxes_per_second_are_predictions_over_generation_time(tmp_path: Path):
    traces = [{"image_id": image_id, "seconds": 0.5 + image_id} for image_id in range(3)]
    run = write_run(tmp_path / "a", SCORED_LINES, LINES, traces)
    metrics = evaluate(from_run(run)).metrics
    assert (metrics["name"], metrics["rollout_seconds"]) == ("a", 4.5)
    assert metrics["boxes_per_second"] == pytest.approx(9 / 4.5)
    no_seconds = write_run(tmp_path / "b", SCORED_LINES, traces=[{"image_id": i} for i in range(3)])
    assert evaluate(from_run(no_seconds)).metrics["boxes_per_second"] is None
    assert evaluate(from_run(write_run(tmp_path / "c", SCORED_LINES))).metrics["rollout_seconds"] is None


def test_scoring_may_leave_predictions_out(tmp_path: Path):
    fewer = [{**line, "pred": line["pred"][:1] + line["pred"][2:]} for line in SCORED_LINES]
    assert evaluate(from_run(write_run(tmp_path / "a", fewer, LINES))).metrics["num_pred"] == 6


def test_a_folder_without_scores_names_the_command_that_makes_them(tmp_path: Path):
    write_jsonl(tmp_path / GT_VS_PRED, LINES)
    with pytest.raises(RecordError, match=rf"coordexp score --run {tmp_path}"):
        from_run(tmp_path)
    with pytest.raises(
        RecordError, match=r"gt_vs_pred\.jsonl:1: predictions carry no scores.*coordexp score"
    ):
        from_run(tmp_path / GT_VS_PRED)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="empty holds no gt_vs_pred_scored"):
        from_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("unscored", "message"),
    [
        (LINES[:2], r"3 and 2 images; image_id 2 is in .*gt_vs_pred_scored\.jsonl only"),
        ([*LINES, unscored_line(8)], r"3 and 4 images; image_id 8 is in .*gt_vs_pred\.jsonl only"),
        ([*LINES[:2], unscored_line(2, image="x.png")], r"image_id 2 is 2\.png \(100 x 80\) in one, x\.png"),
        ([*LINES[:2], unscored_line(2, width=99)], r"2\.png \(100 x 80\) in one, 2\.png \(99 x 80\)"),
        ([*LINES[:2], unscored_line(2, gt=[])], r"image_id 2 \(2\.png\) has 1 and 0 ground-truth objects"),
        ([*LINES[:2], unscored_line(2, pred=[])], r"image_id 2: pred\[0\] \('cat'\).*Score this one again"),
        (
            [*LINES[:2], unscored_line(2, pred=LINES[2]["pred"][:1] * 2)],
            r"image_id 2: pred\[1\] \('dog'\) is not in",
        ),
    ],
)
def test_scores_of_another_run_are_refused(tmp_path: Path, unscored, message):
    with pytest.raises(RecordError, match=message):
        from_run(write_run(tmp_path / "a", SCORED_LINES, unscored))


def test_a_token_trace_of_another_run_is_refused(tmp_path: Path):
    traces = [{"image_id": image_id, "seconds": 1.0} for image_id in (0, 1, 5)]
    with pytest.raises(RecordError, match=r"3 and 3 images; image_id 2 is in .*scored.*\(of 2 such\)"):
        from_run(write_run(tmp_path / "a", SCORED_LINES, LINES, traces))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 1}, r":3: image_id 1 stands in line 2 already"),
        ({"image": "0.png"}, r":3: image '0\.png' stands in line 1 already"),
        ({"pred": [obj("cat", 0, 0, 9, 9, score=float("nan"))]}, r":3: pred\[0\] has score nan"),
        ({"pred": [obj("cat", 0, 0, 9, 9, score=True)]}, r":3: pred\[0\] has score True"),
        ({"pred": [obj("cat", 0, 0, 9)]}, r":3: pred\[0\] \('cat'\) has points .*expected 4 values"),
        ({"pred": [obj("cat", 9, 0, 0, 9)]}, r":3: pred\[0\].*x1 <= x2"),
        ({"gt": [obj("cat", 0, 0, float("inf"), 9)]}, r":3: gt\[0\].*expected finite numbers"),
    ],
)
def test_a_bad_line_is_named_with_line_and_object(tmp_path: Path, change, message):
    lines = [*SCORED_LINES[:2], {**SCORED_LINES[2], **change}]
    text = "".join(json.dumps(line) + "\n" for line in lines)  # writes NaN, as other tools may
    (tmp_path / SCORED).write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        from_run(tmp_path)


def test_a_baseline_stands_beside_the_run_and_must_be_of_the_same_data(tmp_path: Path):
    tuned = from_run(write_run(tmp_path / "tuned", SCORED_LINES))
    untuned = from_run(write_run(tmp_path / "untuned", [{**line, "pred": []} for line in SCORED_LINES]))
    check_baseline(tuned, untuned)
    metrics = with_baseline(evaluate(tuned), evaluate(untuned)).metrics
    assert (metrics["baseline"]["name"], metrics["baseline"]["AP"]) == ("untuned", 0.0)
    # TP FP TP FP TP FP at equal scores: precision 1, 2/3, 3/5 at recall 1/3, 2/3, 1.
    assert headline(metrics)["AP"] == pytest.approx((34 * 1 + 33 * 2 / 3 + 34 * 3 / 5) / 101)
    assert set(headline(metrics)) < set(metrics["baseline"])
    other = from_run(write_run(tmp_path / "other", [scored_line(unscored_line(i)) for i in (0, 1, 7)]))
    with pytest.raises(RecordError, match=r"tuned.*and.*other.*image_id 2 is in .*tuned"):
        check_baseline(tuned, other)


def test_the_image_folder_is_the_one_that_inference_recorded(tmp_path: Path):
    assert recorded_image_root(tmp_path) is None
    (tmp_path / "data").mkdir()
    (tmp_path / RUN_META).write_text(json.dumps({"data": str(tmp_path / "data" / "val.jsonl")}))
    assert recorded_image_root(tmp_path) == recorded_image_root(tmp_path / SCORED) == tmp_path / "data"
