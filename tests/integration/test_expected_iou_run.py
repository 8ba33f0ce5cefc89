"""`coordexp score --method expected_iou`: from what was noted while generating, and by a forward over the answers."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image
from support.processes import run_coordexp

from coordexp.config import DEFAULT_PROMPT
from coordexp.eval import expected_iou
from coordexp.geometry import quantize_points
from coordexp.inference.infer import infer_file

pytestmark = pytest.mark.slow


def lines(file: Path) -> list[dict]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def scores(run: Path) -> list[list[float]]:
    return [[obj["score"] for obj in line["pred"]] for line in lines(run / "gt_vs_pred_scored.jsonl")]


@pytest.fixture(scope="module")
def run(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("infer") / "out"
    done = run_coordexp(
        "infer", "--model", taught_model, "--data", scenes / "train.jsonl", "--output", output,
        "--max-new-tokens", 160, "--batch-size", 3, "--coord", "median",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_coordexp("score", "--run", output, "--method", "expected_iou")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (output / "coord_distributions.jsonl").exists()  # nothing to find out
    return output


def test_guided_answers_are_those_that_parsed_without(
    run: Path, taught_model: Path, scenes: Path, tmp_path: Path
):
    """Token for token, with coordinates read as their median; all others are whole too."""
    guided = infer_file(
        taught_model, scenes / "train.jsonl", tmp_path, max_new_tokens=160, batch_size=3, coord="median", guided=True
    )  # fmt: skip
    parsed = 0
    for plain, other, line, result in zip(
        lines(run / "pred_token_trace.jsonl"), lines(tmp_path / "pred_token_trace.jsonl"),
        lines(run / "gt_vs_pred.jsonl"), guided, strict=True,
    ):  # fmt: skip
        assert not result.errors
        if plain["finish_reason"] == "stop" and not line["errors"]:
            parsed += 1
            assert other["generated_token_text"] == plain["generated_token_text"]
    assert parsed > 4
    settings = [
        json.loads((folder / "infer_run.json").read_text())["decoding"]["guided"]
        for folder in (run, tmp_path)
    ]
    assert settings == [False, True]


def test_scores_are_those_of_a_plain_forward(run: Path, taught_model: Path, scenes: Path):
    """Reference: transformers alone, one image at a time, whole distributions."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(taught_model).eval()
    processor = AutoProcessor.from_pretrained(taught_model)
    tokenizer = processor.tokenizer
    coord_ids = tokenizer.convert_tokens_to_ids([f"<|coord_{k}|>" for k in range(1000)])
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    compared = 0
    traces, scored = lines(run / "pred_token_trace.jsonl"), lines(run / "gt_vs_pred_scored.jsonl")
    for trace, line in zip(traces, scored, strict=True):
        inputs = processor(text=[prompt], images=[Image.open(scenes / line["image"])], return_tensors="pt")
        answer = tokenizer.convert_tokens_to_ids(trace["generated_token_text"])
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            logits = (
                model(
                    input_ids=ids,
                    pixel_values=inputs["pixel_values"],
                    image_grid_thw=inputs["image_grid_thw"],
                    mm_token_type_ids=(ids == model.config.image_token_id).int(),
                )
                .logits[0]
                .double()
            )
        spans = zip(trace["object_token_positions"], trace["object_desc_token_positions"], strict=True)
        for obj, (coords, descs) in zip(line["pred"], spans, strict=True):
            probs = torch.stack([logits[start + p - 1, coord_ids].softmax(-1) for p in coords]).numpy()
            points = [obj["points"][:2], obj["points"][2:]]
            box = quantize_points(points, line["width"], line["height"]).ravel()
            desc = sum(float(logits[start + p - 1].log_softmax(-1)[answer[p]]) for p in descs)
            expected = expected_iou(probs, box) * float(torch.tensor(desc).exp())
            assert obj["score"] == pytest.approx(expected, abs=0.01)
            medians = [int((row.cumsum() >= 0.5).argmax()) for row in probs]
            assert box.tolist() == medians
            compared += 1
    assert compared >= 8


def test_a_forward_over_the_answers_finds_what_was_not_noted(run: Path, scenes: Path, tmp_path: Path):
    """As for answers of vLLM or a server; stopped in the middle of a line, the pass goes on."""
    blind = copytree(run, tmp_path / "blind")
    traces = lines(blind / "pred_token_trace.jsonl")
    for trace in traces:
        del trace["coord_distributions"]
    (blind / "pred_token_trace.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    (blind / "gt_vs_pred_scored.jsonl").unlink()
    command = ["score", "--run", blind, "--method", "expected_iou", "--batch-size", 3]
    done = run_coordexp(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, noted in zip(scores(blind), scores(run), strict=True):
        assert mine == pytest.approx(noted, abs=2e-3)
    whole = (blind / "coord_distributions.jsonl").read_bytes()
    found = whole.splitlines(keepends=True)
    (blind / "coord_distributions.jsonl").unlink()
    (blind / "coord_distributions.jsonl.partial").write_bytes(b"".join(found[:4]) + found[4][:30])
    assert run_coordexp(*command).returncode == 0
    assert (blind / "coord_distributions.jsonl").read_bytes() == whole

    traces[0]["generated_token_text"][0] = "<|coord_1|>"
    (blind / "pred_token_trace.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    done = run_coordexp(*command)
    assert done.returncode == 2
    assert "is of other answers than the trace beside it" in done.stderr

    (blind / "coord_distributions.jsonl").unlink()
    done = run_coordexp(*command, "--data", scenes / "val.jsonl")
    assert done.returncode == 2
    assert "is not the data that" in done.stderr
