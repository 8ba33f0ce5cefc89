"""`coordexp infer`, `score` and `eval` on a real (untrained) checkpoint, and the greedy rollout they rest on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from support.latents import asked_scenes, latent_checkpoint
from support.processes import ROOT, run_coordexp
from support.vllm import require_vllm

from coordexp.cli.main import main
from coordexp.config import DEFAULT_PROMPT
from coordexp.handover.card import METRICS

pytestmark = pytest.mark.slow
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def run(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("infer") / "out"
    done = run_coordexp(
        "infer", "--model", nano_model, "--data", scenes / "val.jsonl", "--output", output,
        "--max-new-tokens", NEW_TOKENS, "--batch-size", 3, "--coord", "argmax",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def lines(file: Path) -> list[dict]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_tokens_and_log_probabilities_are_those_of_greedy_decoding(run: Path, nano_model: Path, scenes: Path):
    """Reference: one image at a time, one full forward per token, no cache and no padding."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(nano_model).eval()
    processor = AutoProcessor.from_pretrained(nano_model)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    stop = set(model.generation_config.eos_token_id)
    records = lines(scenes / "val.jsonl")
    for record, trace in zip(records, lines(run / "pred_token_trace.jsonl"), strict=True):
        inputs = processor(
            text=[prompt], images=[Image.open(scenes / record["images"][0])], return_tensors="pt"
        )
        ids, answer, logprobs = inputs["input_ids"], [], []
        while len(answer) < NEW_TOKENS and (not answer or answer[-1] not in stop):
            with torch.no_grad():
                row = model(
                    input_ids=ids,
                    pixel_values=inputs["pixel_values"],
                    image_grid_thw=inputs["image_grid_thw"],
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                ).logits[0, -1]
            answer.append(int(row.argmax()))
            logprobs.append(float(row.log_softmax(-1)[answer[-1]]))
            ids = torch.cat([ids, torch.tensor([[answer[-1]]])], dim=1)
        assert trace["generated_token_text"] == processor.tokenizer.convert_ids_to_tokens(answer)
        assert trace["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
        assert trace["num_prompt_tokens"] == inputs["input_ids"].shape[1]


def test_ground_truth_comes_back_in_pixels(run: Path, scenes: Path):
    for record, line in zip(lines(scenes / "val.jsonl"), lines(run / "gt_vs_pred.jsonl"), strict=True):
        assert [obj["desc"] for obj in line["gt"]] == [obj["desc"] for obj in record["objects"]]
        for obj, source in zip(line["gt"], record["objects"], strict=True):
            assert obj["points"] == pytest.approx([k * 63 / 999 for k in source["bbox_2d"]])


def test_score_and_eval_finish_the_job(run: Path):
    assert run_coordexp("eval", "--run", run).returncode == 2  # nothing scored yet
    assert run_coordexp("score", "--run", run).returncode == 0
    done = run_coordexp("eval", "--run", run)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_images"] == 4
    assert "f1_at_50" in done.stdout


def test_the_model_card_has_the_numbers_and_pictures_of_the_evaluation(
    run: Path, nano_model: Path, tmp_path: Path
):
    flags = ["--eval", str(run), "--out", str(tmp_path / "card" / "README.md"), "--pictures", "2"]
    assert main(["model", "card", str(nano_model), *flags]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        name: metrics[name] for name in METRICS if metrics[name] not in (None, -1)
    }
    assert {one.dataset_name for one in card.data.eval_results} == {"scenes/val (4 images)"}
    drawn = re.findall(r"!\[.*\]\((.*)\)", card.text)
    assert drawn == ["pictures/answer_0_0.png", "pictures/answer_0_1.png"]
    panel = 64 * 5  # enlarged by a whole factor to 320, twice beside each other
    assert all(Image.open(tmp_path / "card" / name).width >= 2 * panel for name in drawn)


def test_a_folder_that_is_no_checkpoint(scenes: Path, tmp_path: Path):
    done = run_coordexp(
        "infer", "--model", tmp_path, "--data", scenes / "val.jsonl", "--output", tmp_path / "out"
    )
    assert done.returncode == 2
    assert "is not a model folder" in done.stderr
    assert not (tmp_path / "out").exists()
    assert done.stdout == ""  # no progress bar of a run that never began


def without_times(file: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(file)]


def test_a_killed_run_goes_on_where_it_was(nano_model: Path, scenes: Path, tmp_path: Path):
    flags = [
        "infer", "--model", nano_model, "--data", scenes / "train.jsonl", "--max-new-tokens", 96, "--batch-size", 1,
    ]  # fmt: skip
    assert run_coordexp(*flags, "--output", tmp_path / "whole").returncode == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "coordexp.cli.main", *map(str, flags), "--output", str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = killed / "gt_vs_pred.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists(), "the run was over before it could be killed"
    other = run_coordexp(*flags[:-1], 1, "--limit", 5, "--output", killed)
    assert other.returncode == 2
    assert "num_images: 8 there, 5 now" in other.stderr
    done = run_coordexp(*flags, "--output", killed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 8 images; going on" in done.stdout
    for name in ("gt_vs_pred.jsonl", "pred_token_trace.jsonl"):
        assert without_times(killed / name) == without_times(tmp_path / "whole" / name)
    assert not partial.exists()


@pytest.mark.vllm
def test_vllm_predicts_what_transformers_predicts(nano_model: Path, scenes: Path, tmp_path: Path):
    """Greedy in float32: the same prompts, tokens and log-probabilities.

    Both read a latent prefix, each record with the vectors of its own list, some of them dropped; in the engine they
    are embedded beside the picture, whose deepstack features are not theirs.
    """
    require_vllm()
    model = tmp_path / "model"
    lists = [["red box", "blue circle", "green triangle"], ["black box", "red circle"]]
    latent_checkpoint(nano_model, model, "Detect {classes}.", 8, keep_prob=0.7)
    assert json.loads((model / "config.json").read_text())["vision_config"]["deepstack_visual_indexes"]
    data = asked_scenes(scenes, tmp_path / "data", lists)
    for backend in ("hf", "vllm"):
        done = run_coordexp(
            "infer", "--model", model, "--data", data, "--output", tmp_path / backend, "--max-new-tokens", 48,
            "--backend", backend,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert lines(tmp_path / "hf" / "gt_vs_pred.jsonl") == lines(tmp_path / "vllm" / "gt_vs_pred.jsonl")
    traces = [lines(tmp_path / backend / "pred_token_trace.jsonl") for backend in ("hf", "vllm")]
    for hf, vllm in zip(*traces, strict=True):
        for key in ("generated_token_text", "text", "finish_reason", "num_prompt_tokens"):
            assert hf[key] == vllm[key], key
        assert vllm["token_logprobs"] == pytest.approx(hf["token_logprobs"], abs=1e-4)
