"""Real `swift sft` runs of the stage-1 trainer: what they log, what they leave behind, one rank and two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import Hub, serve_hub
from support.processes import free_port, run_coordexp, run_fresh_swift, run_swift, sft_flags

from coordexp.config import load_run_config
from coordexp.config.checks.swift_arguments import all_arguments
from coordexp.config.run.resolved import is_run_context
from coordexp.metrics.catalog import lookup
from coordexp.metrics.payload import validate_payload
from coordexp.telemetry.doctor.diagnose import diagnose
from coordexp.telemetry.life.beats import STOPPED, RankEnd, read_beats

pytestmark = pytest.mark.slow

TOKEN = "hf_nobodys"
BASE_CE = ("loss", "noncoord_tokens")
COORD_DIAG = (
    "enabled", "loss", "soft_ce", "w1", "ce", "gate", "coord_vocab_mass", "coord_tokens", "acc_top5", "p_gt_mean",
    "margin_mean", "expected_bin_mae", "expected_bin_abs_err_p90", "w1_to_delta",
)  # fmt: skip
ALIASES = ("loss", "soft_ce", "w1", "ce", "gate")
STAGE1_KEYS = (
    {f"base_ce/{name}" for name in BASE_CE}
    | {f"coord_diag/{name}" for name in COORD_DIAG}
    | {f"coord_softce_w1/{name}" for name in ALIASES}
    | {"token_acc", "pack/num_samples"}
)
MIX = {"coord_soft_ce_w1": {"soft_ce_weight": 0.5, "w1_weight": 2.0, "ce_weight": 0.25, "gate_weight": 1.5}}


def payloads(run: Path) -> tuple[dict, list[dict]]:
    first, *rest = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return first, rest


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub() as found:
        yield found


@pytest.fixture(scope="module")
def run(nano_model: Path, scenes: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uploaded as well, at its checkpoint and at its end."""
    output = tmp_path_factory.mktemp("runs") / "stage1"
    flags = sft_flags(
        nano_model, scenes, output, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, report_to="tensorboard",
        coordexp=json.dumps({"custom": MIX, "telemetry": {"console": {"every_steps": {"level_2": 2, "level_3": 3}}}}),
        use_hf=True, push_to_hub=True, hub_model_id="team/detector", hub_token=TOKEN,
    )  # fmt: skip
    # in a new interpreter: what has imported huggingface_hub keeps its endpoint, and stays offline
    done = run_fresh_swift("sft", *flags, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


def test_what_push_to_hub_uploads_is_the_model_with_the_card_of_the_run(run: Path, hub: Hub):
    assert hub.tokens == {f"Bearer {TOKEN}"}
    files = hub.files("team/detector")
    assert [name for name, content in files.items() if TOKEN.encode() in content] == []
    assert "training_args.bin" in files
    assert [(name, message) for name, message, _ in hub.commits] == [
        ("team/detector", "Training in progress, step 3"),
        ("team/detector", "End of training"),
    ]
    assert files.keys() >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "coordexp_prompt.json",
        "README.md",
    }
    weights = hashlib.sha256(files["model.safetensors"]).hexdigest()
    for card in (*hub.cards, files["README.md"].decode()):
        assert f"`{weights}`" in card
        assert "generated_from_trainer" not in card
        assert "stage1_coord, 3 steps of 8 samples on 1 rank." in card
    assert len(hub.cards) == 2
    assert files["README.md"] == (run / "README.md").read_bytes()
    recipe = files["README.md"].decode().split("```yaml\n")[1].split("```")[0]
    (run / "recipe.yaml").write_text(recipe)
    again = load_run_config(run / "recipe.yaml", world_size=1)
    ran = json.loads((run / "resolved_config.json").read_text())
    assert again.sections.custom.model_dump() == ran["custom"]
    said = {name: again.swift.get(name, argument.default) for name, argument in all_arguments().items()}
    told = {name: value for name, value in ran["swift"].items() if value is not None and name in said}
    assert {name for name in told if told[name] != said[name] and not is_run_context(name)} == set()


def test_run_log_has_the_lines_of_every_level_and_no_records(run: Path):
    _, records = payloads(run)
    said = (run / "run.log").read_text().splitlines()
    steps = [line for line in said if line.startswith("step ")]
    for record, line in zip(records, steps, strict=False):
        numbers = record["metrics"]
        assert line.startswith(f"step {record['global_step']}/3 · loss {numbers['loss']:.4g} (")
        assert f" · lr 0.001 stable · grad norm {numbers['grad_norm']:.3g} · " in line
    assert len(steps) == 3
    first, second, third = (said.index(line) for line in steps)
    assert (second - first, said[second + 1].split(":")[0]) == (1, "  loss")
    below = [line.split(":")[0] for line in said[third + 1 :] if line.startswith("  ")][:4]
    assert below == ["  schedule", "  packing", "  memory", "  time"]
    loss = records[1]["metrics"]
    atoms = {"text": loss["base_ce/loss"]} | {
        name: MIX["coord_soft_ce_w1"][f"{name}_weight"] * loss[f"coord_diag/{name}"]
        for name in ("soft_ce", "w1", "ce", "gate")
    }
    assert said[second + 1] == "  loss: " + ", ".join(
        f"{name} {value:.4g} ({value / sum(atoms.values()):.0%})"
        for name, value in sorted(atoms.items(), key=lambda item: -item[1])
    )
    evaluation = next(record["metrics"] for record in records if record["mode"] == "eval")
    assert any(line.startswith(f"eval at step 3/3 · loss {evaluation['eval_loss']:.4g} · ") for line in said)
    assert any(line.startswith("done at step 3/3 · mean loss ") for line in said)
    assert [line for line in said if "'loss'" in line or "\x1b" in line] == []


def test_stats_say_where_the_run_stands(run: Path):
    _, records = payloads(run)
    stats = validate_payload(json.loads((run / "stats.json").read_text()))
    assert (stats["mode"], stats["global_step"]) == ("train", 3)
    last = records[2]["metrics"]
    assert stats["metrics"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert stats["metrics"]["time/step_s"] > 0
    assert stats["progress"]["max_steps"] == 3
    assert stats["progress"]["eta_s"] == 0
    assert stats["recorded"] == {"train": 3, "eval": 3}


def test_every_stage1_number_leaves_in_train_and_eval(run: Path):
    meta, records = payloads(run)
    resolved = json.loads((run / "resolved_config.json").read_text())
    assert (meta["record"], meta["variant"]) == ("run_meta", "stage1_coord")
    assert meta["config_hash"] == resolved["config_hash"]
    assert resolved["derived"]["effective_batch_size"] == 8
    train = [r for r in records if r["mode"] == "train" and "loss" in r["metrics"]]
    evaluation = [r for r in records if "eval_loss" in r["metrics"]]
    assert [r["global_step"] for r in train] == [1, 2, 3]
    assert [r["global_step"] for r in evaluation] == [3]
    assert train[0]["metrics"].keys() >= STAGE1_KEYS
    assert {f"eval_{key}" for key in STAGE1_KEYS} <= evaluation[0]["metrics"].keys()
    assert [r["mode"] for r in records] == [
        "train",
        "train",
        "train",
        "eval",
        "train",
    ]  # last: the run's summary


def test_records_are_valid_payloads_of_known_keys(run: Path):
    _, records = payloads(run)
    for record in records:
        assert validate_payload(record)["schema_version"] == 1
        assert [key for key in record["metrics"] if lookup(key) is None] == []


def test_the_best_checkpoint_is_announced_recorded_and_linked(run: Path):
    derived = json.loads((run / "resolved_config.json").read_text())["derived"]
    assert (derived["metric_for_best_model"], derived["greater_is_better"]) == ("loss", False)
    assert (run / "best").resolve() == (run / "checkpoint-3").resolve()
    assert (run / "best" / "model.safetensors").is_file()
    assert run_coordexp("doctor", run).returncode == 0


GOAL = 13.0
"""Of the loss on validation scenes: an untrained model starts above it."""


def test_saving_starts_late_and_includes_the_last_step(nano_model: Path, scenes: Path, tmp_path: Path):
    """A learning rate that wrecks the model: the last step is not the best, and is saved all the same."""
    flags = sft_flags(
        nano_model, scenes, tmp_path / "run", max_steps=4, learning_rate=0.5, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=1, save_strategy="best", save_only_model=True,
        coordexp=json.dumps({"training": {"save_delay_steps": 2, "save_last_epoch": True}}),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    console = done.stdout + done.stderr
    assert done.returncode == 0, console[-3000:]
    losses = {
        record["global_step"]: record["metrics"]["eval_loss"]
        for record in payloads(tmp_path / "run")[1]
        if "eval_loss" in record["metrics"]
    }
    best = min((step for step in losses if step >= 2), key=lambda step: losses[step])
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert (min(losses), max(saved)) == (1, 4)
    assert set(saved) >= {best, 4}
    assert min(saved) >= 2
    assert (tmp_path / "run" / "best").resolve().name == f"checkpoint-{best}"
    assert console.count("picks no best checkpoint: it comes before training.save_delay_steps") == 1


def test_a_run_that_has_reached_its_goal_ends_there_saved(nano_model: Path, scenes: Path, tmp_path: Path):
    goals = [
        {"metric": "eval_loss", "op": "<", "value": GOAL},
        {"metric": "eval_loss", "op": ">", "value": 0},
    ]
    flags = sft_flags(
        nano_model, scenes, tmp_path / "run", max_steps=6, learning_rate=0.01, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=100, save_only_model=True,
        coordexp=json.dumps({"training": {"stop_when": goals}}),
    )  # fmt: skip
    done = run_swift("sft", *flags)
    console = done.stdout + done.stderr
    assert done.returncode == 0, console[-3000:]
    losses = {
        record["global_step"]: record["metrics"]["eval_loss"]
        for record in payloads(tmp_path / "run")[1]
        if "eval_loss" in record["metrics"]
    }
    last = max(losses)
    assert 1 < last < 6, losses
    assert [step for step, loss in losses.items() if loss < GOAL] == [last]
    assert (tmp_path / "run" / f"checkpoint-{last}").is_dir()
    assert f"Step {last} reached eval_loss < {GOAL:g} ({losses[last]:.6g})" in console


def test_logged_terms_add_up_to_the_logged_loss(run: Path):
    _, records = payloads(run)
    for record in records:
        prefix = {"train": "", "eval": "eval_"}[record["mode"]]
        metrics = {key.removeprefix(prefix): value for key, value in record["metrics"].items()}
        if "coord_diag/loss" not in metrics:
            continue
        weighted = sum(
            MIX["coord_soft_ce_w1"][f"{name}_weight"] * metrics[f"coord_diag/{name}"]
            for name in ("soft_ce", "w1", "ce", "gate")
        )
        assert metrics["coord_diag/loss"] == pytest.approx(weighted, rel=1e-5)
        # In evaluation the 4 scenes come in batches of 3 and 1: the loss is that of all of them together.
        assert metrics["loss"] == pytest.approx(metrics["base_ce/loss"] + weighted, rel=1e-5)
        assert metrics["coord_softce_w1/w1"] == metrics["coord_diag/w1"]


def test_loss_goes_down_and_a_checkpoint_that_loads_is_left(run: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, records = payloads(run)
    losses = [r["metrics"]["loss"] for r in records if "loss" in r["metrics"]]
    assert losses[-1] < losses[0]
    model = AutoModelForImageTextToText.from_pretrained(run / "checkpoint-3")
    processor = AutoProcessor.from_pretrained(run / "checkpoint-3")
    assert processor.tokenizer.convert_tokens_to_ids("<|coord_999|>") < model.config.text_config.vocab_size


def test_tensorboard_holds_the_numbers(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, records = payloads(run)
    [events] = list(run.rglob("events.out.tfevents.*"))
    scalars = EventAccumulator(str(events.parent)).Reload()
    logged = {event.step: event.value for event in scalars.Scalars("coord_diag/expected_bin_mae")}
    for record in records:
        if record["mode"] == "train" and "loss" in record["metrics"]:
            value = record["metrics"]["coord_diag/expected_bin_mae"]
            assert logged[record["global_step"]] == pytest.approx(value, rel=1e-5)


def test_two_ranks_share_one_loss_and_end_after_the_same_step_when_a_rule_asks(
    nano_model: Path, scenes: Path, tmp_path: Path, run: Path
):
    """The record of step 2 trips the rule on rank 0; the others hear of it in step 3, which is the last one of both."""
    rule = {"name": "mine", "key": "loss", "condition": "> 0", "from_step": 2, "meaning": "m", "action": "a"}
    sections = {"custom": MIX, "telemetry": {"rules": [rule], "stop_on": ["oom_retries", "mine"]}}
    output, told = tmp_path / "out", tmp_path / "code"
    flags = sft_flags(
        nano_model, scenes, output, max_steps=50, per_device_train_batch_size=2, save_strategy="no",
        gradient_accumulation_steps=2, coordexp=json.dumps(sections), train_dataloader_shuffle=False,
    )  # fmt: skip
    environment = {"NPROC_PER_NODE": "2", "MASTER_PORT": free_port(), "COORDEXP_EXIT_FILE": str(told)}
    done = run_fresh_swift("sft", *flags, **environment)
    assert done.returncode != 0, done.stdout[-3000:]
    assert told.read_text() == "4"  # the launcher of several processes answers 1
    assert (
        "coordexp: stopped after step 3 by the rule mine (telemetry.stop_on); checkpoint-3 is saved."
        in done.stderr
    )
    beats = read_beats(output)
    assert [(beat.rank, beat.step, beat.end) for beat in beats] == [
        (rank, 3, RankEnd(STOPPED, "mine")) for rank in (0, 1)
    ]
    assert all(beat.busy_s > 0 for beat in beats)
    assert (output / "checkpoint-3" / "model.safetensors").exists()
    assert not (output / "postmortem.json").exists()
    found = diagnose(output)
    assert found.state == "stopped by the rule mine"
    assert [problem.finding.rule for problem in found.problems] == ["mine"]
    _, records = payloads(output)
    losses = [r["metrics"]["loss"] for r in records if "loss" in r["metrics"]]
    # All 8 scenes are in every step of both runs, so the first losses agree whatever the cut.
    first = next(r["metrics"]["loss"] for r in payloads(run)[1] if "loss" in r["metrics"])
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert len(losses) == 3
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["metrics"]["loss"] == pytest.approx(losses[-1], rel=1e-6)  # of both ranks


def test_coordexp_train_runs_the_ablation_it_prints(nano_model: Path, scenes: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{model: {nano_model}, model_type: qwen3_vl, torch_dtype: float32, attn_impl: sdpa}}
data: {{max_length: 512, strict: true, load_from_cache_file: false}}
telemetry: {{trajectory_probe: {{every_steps: 1}}}}
tuner: {{tuner_type: full, freeze_vit: false, freeze_aligner: false}}
training:
  output_dir: {tmp_path / "out"}
  add_version: false
  max_steps: 5
  effective_batch_size: 8
  per_device_train_batch_size: 4
  learning_rate: 0.001
  gradient_checkpointing: false
  eval_strategy: steps
  eval_steps: 1
  save_strategy: 'no'
  logging_steps: 1
  report_to: none
  use_cpu: true
  fp16: false
  bf16: false
  check_model: false
custom:
  trainer_variant: stage1_coord
  train_jsonl: {scenes / "train.jsonl"}
  val_jsonl: {scenes / "val.jsonl"}
"""
    )
    overrides = ("--set", "custom.coord_soft_ce_w1.enabled=false", "--max_steps", "1")
    dry = run_coordexp("train", config, "--dry-run", *overrides)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("running: swift sft ")
    done = run_coordexp("train", config, *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert dry.stdout.splitlines()[0] in done.stdout
    _, records = payloads(tmp_path / "out")
    metrics = next(r["metrics"] for r in records if "loss" in r["metrics"])
    assert metrics["coord_diag/enabled"] == 0.0
    num_text = metrics["base_ce/noncoord_tokens"]
    num_coord = metrics["coord_diag/coord_tokens"]
    # Ordinary cross-entropy: of coordinate rows it is the cross-entropy on bins plus the gate (at temperature 1).
    coord_ce = metrics["coord_diag/ce"] + metrics["coord_diag/gate"]
    expected = (num_text * metrics["base_ce/loss"] + num_coord * coord_ce) / (num_text + num_coord)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    # The probe reads the ground truth of the same four scenes, after the same step.
    [evaluation] = [r["metrics"] for r in records if "eval_loss" in r["metrics"]]
    assert metrics["trajectory/nudged/nll_mean"] == pytest.approx(evaluation["eval_loss"], rel=1e-4)
