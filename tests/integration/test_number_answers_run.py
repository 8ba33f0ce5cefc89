"""Answers in Qwen3-VL's own form, by a model without coordinate tokens: trained, asked, scored, and as it comes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_swift, sft_flags

from coordexp.errors import ConfigError
from coordexp.eval.predictions.confidence import score_directory
from coordexp.inference.infer import infer_file
from coordexp.inference.teacher_forced import record_distributions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model as it would come from the hub: no coordinate token in its vocabulary."""
    from coordexp.models.tiny import build_tiny_model

    path = tmp_path_factory.mktemp("assets") / "plain"
    build_tiny_model(path, preset="nano", seed=0, coord_tokens=False)
    return path


@pytest.fixture(scope="module")
def run(plain_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps on the training scenes: it writes valid answers, many of them wrong."""
    output = tmp_path_factory.mktemp("runs") / "numbers"
    custom = {
        "answer_format": "qwen",
        "coord_tokens": {"enabled": False},
        "coord_soft_ce_w1": {"enabled": False},
        "token_type_metrics": {"enabled": True, "include": ["*"]},
        "rollout_eval": {"enabled": True, "decode_batch_size": 4, "max_new_tokens": 140, "num_images": None},
    }
    flags = sft_flags(
        plain_model, scenes, output, max_steps=60, learning_rate=5e-3, logging_steps=30, eval_strategy="steps",
        eval_steps=60, save_strategy="steps", save_steps=60, save_only_model=True, max_length=768,
        coordexp=json.dumps({"custom": custom}),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def answered(run: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is said about the form: it stands with the checkpoint."""
    output = tmp_path_factory.mktemp("infer") / "out"
    infer_file(run / "checkpoint-60", scenes / "train.jsonl", output, max_new_tokens=140)
    return output


def test_the_numbers_of_training_are_those_of_plain_text(run: Path):
    records = [record["metrics"] for record in lines(run / "metrics.jsonl")[1:]]
    metrics = [record for record in records if "loss" in record][-1]
    assert metrics["loss"] == pytest.approx(metrics["base_ce/loss"])
    assert not [
        key for key in metrics if key.startswith(("coord_diag/", "coord_softce_w1/", "coord_monitor/"))
    ]
    assert 0 < metrics["coord_token_acc"] <= 1
    assert metrics["coord_token_frac"] > 0.2
    asked = [record for record in records if "eval_rollout/f1" in record]
    assert asked[-1]["eval_rollout/pred_objects"] > 0
    derived = json.loads((run / "resolved_config.json").read_text())["derived"]
    assert "coord_token_ids" not in derived


def test_predictions_are_the_pixels_of_the_numbers_that_were_written(answered: Path):
    """n is the bin n up to 500 and n - 1 above; bin k lies at k / 999 of the way from pixel 0 to pixel 63."""
    num_boxes = 0
    for line in lines(answered / "gt_vs_pred.jsonl"):
        if line["raw_output_json"] is None or line["errors"]:
            continue
        records = json.loads(line["raw_output_json"])
        assert [obj["desc"] for obj in line["pred"]] == [record["label"] for record in records]
        for obj, record in zip(line["pred"], records, strict=True):
            expected = [(n if n <= 500 else n - 1) / 999 * 63 for n in record["bbox_2d"]]
            assert obj["points"] == pytest.approx(expected)
            num_boxes += 1
    assert num_boxes > 4


def test_scores_are_of_the_digits(answered: Path):
    assert score_directory(answered) == {}
    traces, scored = lines(answered / "pred_token_trace.jsonl"), lines(answered / "gt_vs_pred_scored.jsonl")
    num_boxes = 0
    for trace, line in zip(traces, scored, strict=True):
        assert line["pred_score_source"] == "coord_number_logprob_mean_exp"
        tokens, logprobs = trace["generated_token_text"], trace["token_logprobs"]
        for obj, positions in zip(line["pred"], trace["object_token_positions"], strict=True):
            assert all(tokens[p].isdigit() for p in positions)
            assert obj["score"] == pytest.approx(math.exp(sum(logprobs[p] for p in positions) / 4))
            num_boxes += 1
    assert num_boxes > 4
    with pytest.raises(ConfigError, match="write coordinates as numbers"):
        record_distributions(answered)


def test_a_model_as_it_comes_is_asked_in_qwens_words_and_read_in_its_form(
    plain_model: Path, scenes: Path, tmp_path: Path
):
    infer_file(plain_model, scenes / "val.jsonl", tmp_path, max_new_tokens=4, limit=1)
    meta = json.loads((tmp_path / "infer_run.json").read_text())
    assert (meta["answer_form"], meta["prompt"][:25]) == ("qwen", "Locate every object in th")
    (line,) = lines(tmp_path / "gt_vs_pred.jsonl")
    assert (line["pred"], line["errors"]["invalid_rollout"]) == ([], 1)
    with pytest.raises(ConfigError, match="reads the distribution over coordinate tokens"):
        infer_file(plain_model, scenes / "val.jsonl", tmp_path / "b", coord="median")
