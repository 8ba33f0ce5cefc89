"""The model card of a run folder that is made by hand: read back by huggingface_hub, its recipe by coordexp."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index
from safetensors.torch import save_file

from coordexp.cli.main import main
from coordexp.config import Prompt, load_run_config
from coordexp.config.prompt import write_prompt
from coordexp.config.run.resolved import resolved_config, write_resolved
from coordexp.handover.card import eval_results, render_card
from coordexp.handover.facts import gather
from coordexp.inference.fingerprint import model_fingerprint

RUN_FILE = """\
model: team/base-4b
model_type: qwen3_vl
tuner_type: full
dataset: [{data}/train.jsonl]
val_dataset: [{data}/gone.jsonl]
max_steps: 40
learning_rate: 3.0e-4
hub_token: hf_secret
output_dir: runs/mine
external_plugins: [coordexp/plugin.py]
ignore_args_error: true
custom_trainer_variant: stage1_coord
coordexp: {{custom: {{object_field_order: geometry_first, coord_soft_ce_w1: {{w1_weight: 3.0}}}}}}
"""
METRICS = {
    "num_images": 7,
    "num_gt": 9,
    "AP": 0.1 + 0.2,
    "AP50": 1 / 3,
    "AP75": -1.0,
    "f1_at_50": 0.0,
    "AR1": 0.4,
}
COMMAND = (
    "/env/lib/swift/cli/sft.py --external_plugins /env/coordexp/plugin.py --hub_token hf_secret --model 'a b'"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two whole checkpoints, of which step 10 is the best; an evaluation of it, and one of the other."""
    data = tmp_path / "set"
    data.mkdir()
    rows = [
        {"objects": [{"desc": "cat"}, {"desc": "Vögel"}]},
        {"objects": [{"desc": "cat"}]},
        {"objects": []},
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(data=data))
    config = load_run_config(tmp_path / "run.yaml", world_size=1)
    folder = tmp_path / "mine"
    resolved = resolved_config(
        config.variant, config.sections, config.swift, derived={"total_steps": 40, "effective_batch_size": 2},
        context={"command": COMMAND, "versions": {"torch": "2.13.0"}},
    )  # fmt: skip
    write_resolved(folder, resolved)
    for step in (10, 20):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"w": torch.full((4,), float(step))}, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text("{}")
        state = {"global_step": step, "max_steps": 20, "best_global_step": 10}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        write_prompt(checkpoint, Prompt(user="Find all.", media_order="text_first"))
        evaluation = folder / f"eval_{step}"
        evaluation.mkdir()
        (evaluation / "metrics.json").write_text(json.dumps({**METRICS, "num_images": step}))
        asked = {
            "model_hash": model_fingerprint(checkpoint), "model": str(checkpoint), "data": "/there/coco/val.jsonl",
            "decoding": {"temperature": 0.0, "seed": None, "coord": "median"},
        }  # fmt: skip
        (evaluation / "infer_run.json").write_text(json.dumps(asked))
    return folder


def test_hugging_face_reads_back_the_very_results(run: Path) -> None:
    assert main(["model", "card", str(run), "--name", "detector: 4B"]) == 0
    shown = [
        EvalResult(
            task_type="object-detection", dataset_type="coco/val", dataset_name="coco/val (10 images)",
            metric_type=key, metric_value=METRICS[key], metric_name=name,
        )
        for key, name in (
            ("AP", "COCO AP (0.5:0.95)"), ("AP50", "COCO AP at 0.5"), ("f1_at_50", "F1 at IoU 0.5"),
        )  # neither AP75, which is -1 for none, nor numbers that the evaluation does not have
    ]  # fmt: skip
    card = ModelCard.load(run / "README.md")
    assert card.data.eval_results == shown
    assert (card.data.model_name, card.data.base_model, card.data.library_name) == (
        "detector: 4B", "team/base-4b", "transformers",
    )  # fmt: skip
    metadata = metadata_load(run / "README.md")
    assert metadata["model-index"] == eval_results_to_model_index("detector: 4B", shown)
    assert metadata["pipeline_tag"] == "image-text-to-text"


def test_its_recipe_is_the_run(run: Path, tmp_path: Path) -> None:
    text = render_card(gather(run))
    recipe = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    again, before = (load_run_config(tmp_path / name, world_size=1) for name in ("recipe.yaml", "run.yaml"))
    assert again.config_hash == before.config_hash
    assert json.loads((run / "resolved_config.json").read_text())["config_hash"] == before.config_hash
    assert yaml.safe_load(recipe)["coordexp"]["custom"]["coord_soft_ce_w1"] == {"w1_weight": 3.0}
    assert len(recipe.splitlines()) < 20
    assert "swift sft --external_plugins coordexp/plugin.py --hub_token '***' --model 'a b'\n" in text


def test_data_weights_and_prompt_are_those_of_the_files_and_no_token_is_told(run: Path) -> None:
    text = render_card(gather(run, fingerprint=model_fingerprint))
    weights = run / "checkpoint-10" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"| model.safetensors | {weights.stat().st_size} | `{digest}` |" in text
    data = run.parent / "set"
    assert f"- `{data}/train.jsonl` (training): 3 records, 3 objects, 2 classes: cat, Vögel\n" in text
    assert f"- `{data}/gone.jsonl` (validation): not counted, the file is not there any more\n" in text
    assert "40 steps of 2 samples on 1 rank.\n" in text
    assert "On `coco/val`, 10 images, 9 objects, decoded with temperature 0.0, coord median:" in text
    assert "hf_secret" not in text
    image, question = text.index('{"type": "image"'), text.index('{"type": "text", "text": "Find all."}')
    assert question < image


def test_an_evaluation_of_another_checkpoint_is_not_taken_for_this_ones(run: Path, capsys) -> None:
    last = gather(run / "checkpoint-20", fingerprint=model_fingerprint)
    assert [one.metric_value for one in eval_results(last)] == [
        METRICS[key] for key in ("AP", "AP50", "f1_at_50")
    ]
    assert [one.num_images for one in last.evaluations] == [20]
    assert main(["model", "card", str(run), "--eval", str(run / "eval_20")]) == 2
    assert "was made with" in capsys.readouterr().err
    assert not (run / "README.md").exists()


def test_a_folder_that_is_no_model(tmp_path: Path, capsys) -> None:
    assert main(["model", "card", str(tmp_path)]) == 2
    assert (
        "holds neither resolved_config.json, as a run folder does, nor config.json" in capsys.readouterr().err
    )
    assert main(["model", "card", str(tmp_path / "none")]) == 2
    assert "no such folder; expected a run folder or a checkpoint." in capsys.readouterr().err


def test_without_results_there_is_no_index(run: Path) -> None:
    assert gather(run).evaluations == ()  # nothing shows whose they are
    for evaluation in run.glob("eval_*/metrics.json"):
        evaluation.unlink()
    text = render_card(gather(run, fingerprint=model_fingerprint))
    assert "model-index" not in text
    assert "## Results" not in text
