"""The whole way on Qwen's own vocabulary and image sizes: tokens added, both stages, inference. About a minute."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from support.processes import run_coordexp, run_swift, sft_flags
from support.real_scenes import real_scenes
from support.stage2 import rollout_aligned
from support.warm import Done

from coordexp.cli.main import main
from coordexp.image_size import PixelLimits
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

MOST_MEMORY_KIB = 6 * 2**20
MOST_SECONDS = 40  # of one core, without the imports of the commands
MAX_PIXELS = 80_000  # in stage 1; stage 2 and inference take it from the checkpoint


def coord_rows(checkpoint: Path):
    """The rows of the 1000 coordinate tokens."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118
        matrix_VH = weights.get_tensor(names[0])
    assert matrix_VH.shape[0] == 152_704
    return matrix_VH[151_669:152_669]


def train(
    model: Path, data: Path, output: Path, *, steps: int, variant: str, sections: dict, **flags
) -> tuple[Path, Done]:
    """The last checkpoint, and what the run took."""
    argv = sft_flags(
        model, data, output, custom_trainer_variant=variant, coordexp=json.dumps(sections), val_dataset=None,
        max_steps=steps, per_device_train_batch_size=2, save_strategy="steps", save_steps=steps,
        save_only_model=True, max_length=512, **flags,
    )  # fmt: skip
    done = run_swift("sft", *argv)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return output / f"checkpoint-{steps}", done


def logged(run: Path) -> list[dict]:
    return [p["metrics"] for p in read_payloads(run / "metrics.jsonl") if p["mode"] == "train"]


def test_from_a_plain_model_to_detections(real_plain_model, real_tok, tmp_path):
    data, model = real_scenes(tmp_path / "data"), tmp_path / "model"
    started = time.process_time()
    assert main(["model", "add-coord-tokens", "--model", str(real_plain_model), "--output", str(model)]) == 0

    stage1, first_run = train(model, data, tmp_path / "stage1", steps=2, variant="stage1_coord", sections={},
                              max_pixels=MAX_PIXELS)  # fmt: skip
    first, second = [record for record in logged(tmp_path / "stage1") if "learning_rate" in record]
    assert 10 < first["loss"] < 20  # log(152,704) = 11.9 for text, and the coordinate terms
    assert second["loss"] < first["loss"]

    sections = rollout_aligned(max_new_tokens=32, packing_length=512, eval_detection={"enabled": False})
    stage2, second_run = train(
        stage1, data, tmp_path / "stage2", steps=1, variant="stage2_rollout_aligned", sections=sections
    )
    (step,) = [record for record in logged(tmp_path / "stage2") if "learning_rate" in record]
    assert step["stage2/raw_rollouts"] == 2

    names = ("tokenizer.json", "chat_template.jinja")
    rows = [coord_rows(folder) for folder in (model, stage1, stage2)]
    assert not rows[0].equal(rows[1])
    assert not rows[1].equal(rows[2])
    for folder in (stage1, stage2):
        assert [(folder / n).read_bytes() for n in names] == [(model / n).read_bytes() for n in names]
        assert PixelLimits.of_folder(folder) == PixelLimits.of_folder(model).within(max_pixels=MAX_PIXELS)

    done = run_coordexp(
        "infer", "--model", stage2, "--data", data / "val.jsonl", "--output", tmp_path / "out",
        "--max-new-tokens", 16,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    traces = [
        json.loads(line) for line in (tmp_path / "out" / "pred_token_trace.jsonl").open(encoding="utf-8")
    ]
    run = json.loads((tmp_path / "out" / "infer_run.json").read_text("utf-8"))
    assert run["pixels"] == {"min_pixels": 65_536, "max_pixels": MAX_PIXELS}
    prompt = "<|im_start|>user\n<|vision_start|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    num_text = len(real_tok.encode(prompt.format(run["prompt"])))
    # The cap of training holds: 416 x 320 pixels become 320 x 224, which are 10 x 7 visual tokens.
    assert {trace["num_prompt_tokens"] for trace in traces} == {num_text + 10 * 7}

    commands = (first_run, second_run, done)
    memory_kib = max(command.most_memory_kib for command in commands)
    seconds = sum(command.cpu_s for command in commands) + time.process_time() - started
    print(f"{seconds:.0f} s, {memory_kib / 2**20:.1f} GiB")
    assert 2**19 < memory_kib < MOST_MEMORY_KIB  # the libraries alone are more than half a GiB
    assert 1 < seconds < MOST_SECONDS
