"""Stage 2 through real `swift sft` runs: what is logged, what sums to the loss, and what the schedule leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_swift, sft_flags
from support.stage2 import rollout_aligned, two_channel
from support.vllm import require_vllm

from coordexp.metrics.keys_rollout import SECTIONS as ROLLOUT_SECTIONS
from coordexp.metrics.keys_rollout import WITH_ROLLOUT
from coordexp.metrics.sinks import read_payloads

pytestmark = pytest.mark.slow

Records = list[dict[str, Any]]


def train(
    model: Path, scenes: Path, output: Path, variant: str, sections: dict[str, Any], **flags: Any
) -> Records:
    """The training records of a run; what it printed is in `console.txt`."""
    argv = sft_flags(
        model, scenes, output, custom_trainer_variant=variant, coordexp=json.dumps(sections),
        **{"max_steps": 3, "learning_rate": 1e-3, "val_dataset": None, **flags},
    )  # fmt: skip
    done = run_swift("sft", *argv)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (output / "console.txt").write_text(done.stdout + done.stderr)
    return [p["metrics"] for p in read_payloads(output / "metrics.jsonl") if p["mode"] == "train"]


def steps(records: Records) -> Records:
    return [record for record in records if "learning_rate" in record]


def atoms(record: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("loss/")}


@pytest.fixture(scope="module")
def outlined(scenes: Path) -> Path:
    """The training scenes, every second object an outline: the corners of its box and the middle of its top."""
    records = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()]
    for record in records:
        for obj in record["objects"][::2]:
            x1, y1, x2, y2 = obj.pop("bbox_2d")
            obj["poly"] = [x1, y1, (x1 + x2) // 2, y1, x2, y1, x2, y2, x1, y2]
    file = scenes / "outlined.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def aligned(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps with everything on, evaluated at the fourth."""
    output = tmp_path_factory.mktemp("aligned") / "run"
    sections = rollout_aligned(
        desc_monitor={"enabled": True},
        monitor_dump={"enabled": True, "every_steps": 2, "max_samples": 2},
        eval_prompt_variant="other",
    ) | {"custom": {"prompt_variants": {"other": "What is there?"}}}
    train(
        taught_model, scenes, output, "stage2_rollout_aligned", sections, max_steps=5, val_dataset=scenes / "val.jsonl",
        eval_strategy="steps", eval_steps=4, include_num_input_tokens_seen=True,
    )  # fmt: skip
    return output


def payloads(run: Path, mode: str) -> Records:
    return [p["metrics"] for p in read_payloads(run / "metrics.jsonl") if p["mode"] == mode]


def test_input_tokens_are_those_of_the_samples(aligned):
    seen = 0.0
    for record in steps(payloads(aligned, "train")):  # packs: no padding
        built = record["stage2/raw_rollouts"] - record["stage2_ab/channel_b/closure_supervision/N_drop"]
        seen += record["rollout/encoded_len_mean"] * built
        assert record["num_input_tokens_seen"] == pytest.approx(seen)


def test_the_console_says_what_the_model_wrote_and_stats_hold_the_loss_of_the_step(aligned):
    *_, last = steps(payloads(aligned, "train"))
    said = (aligned / "run.log").read_text().splitlines()
    [line] = [line for line in said if line.startswith("step 5/5 · ")]
    assert f" · F1 {last['rollout/f1']:.3g} · " in line
    assert f"truncated {last['rollout/parse_truncated_rate']:.0%}" in line
    largest, *_ = sorted(atoms(last).items(), key=lambda item: -item[1])
    assert f"loss {last['loss']:.4g} ({largest[0].split('/')[-1]} {largest[1]:.4g}" in line
    assert any(line.startswith("eval at step 4/5 · F1 ") for line in said)
    stats = json.loads((aligned / "stats.json").read_text())
    assert stats["global_step"] == 5
    assert stats["metrics"]["loss"] == pytest.approx(last["loss"], rel=1e-6)


WITHOUT_EMBEDDINGS = {
    "rollout/desc_sem_acc_on_matched",
    "rollout/desc_sem_sim_mean",
    "rollout/desc_sem_sim_count",
}
"""Absent for a reason: the description monitor compares texts only (`mode: exact`)."""


def test_every_rollout_metric_of_the_catalogue_is_logged(aligned):
    found = set().union(*steps(payloads(aligned, "train")))
    expected = {
        spec.key
        for section in ROLLOUT_SECTIONS
        for spec in section.specs.values()
        if spec.when == WITH_ROLLOUT or "desc_monitor" in spec.when or "pack" in spec.key
    }
    assert expected - WITHOUT_EMBEDDINGS - found == set()
    assert {"train/samples_total", "train/samples_seen", "train/micro_steps", "stage2/raw_rollouts"} <= found


def test_evaluation_reports_rollouts_and_no_loss(aligned):
    metrics, _at_the_end = payloads(aligned, "eval")
    wanted = (
        "precision recall f1 pred_objects gt_objects matched fp fn parse_truncated_rate parse_dropped_invalid "
        "parse_dropped_ambiguous sample_valid_pred_rate sample_any_match_rate mAP coco_eval_ok desc_pairs_total "
        "duplicate_rate_mean duplicate_rate_p99"
    )
    assert {f"eval_rollout/{name}" for name in wanted.split()} <= metrics.keys()
    assert "eval_loss" not in metrics
    assert metrics["eval_rollout/gt_objects"] == metrics["eval_rollout/matched"] + metrics["eval_rollout/fn"]
    assert (
        metrics["eval_rollout/pred_objects"] == metrics["eval_rollout/matched"] + metrics["eval_rollout/fp"]
    )
    assert not any(key.startswith(("eval_loss/", "eval_time/", "eval_packing")) for key in metrics)


def test_an_evaluation_says_which_prompt_made_its_numbers(aligned):
    said = {
        (record["mode"], json.dumps(record.get("prompt")))
        for record in read_payloads(aligned / "metrics.jsonl")
    }
    asked = json.dumps({"variant": "other", "user": "What is there?"})
    assert said == {("train", "null"), ("eval", asked)}
    dump = json.loads((aligned / "monitor_dumps" / "step_000002" / "sample_00.json").read_text())
    assert "Detect all objects in the image." in dump["prompt"]
    console = (aligned / "console.txt").read_text()
    assert "Evaluation asks in another way than training: 'What is there?'." in console


def test_rollout_numbers_of_a_step_agree_with_each_other(aligned):
    for step in steps(payloads(aligned, "train")):
        predicted, true = step["rollout/valid_pred_objects_total"], step["rollout/gt_objects_total"]
        matched = step["rollout/matched_for_supervision"]
        assert step["rollout/f1"] == pytest.approx(2 * matched / (predicted + true), rel=1e-6)
        assert step["rollout/fn_total"] == true - matched
        assert step["stage2/raw_rollouts"] == step["train/samples_total"] == 8
        assert step["rollout/gen_tokens_per_s"] == pytest.approx(
            step["rollout/gen_new_tokens_total"] / step["time/rollout_generate_s"], rel=1e-3
        )


def test_dumps_show_prompt_rollout_and_target(aligned):
    folders = sorted(path.name for path in (aligned / "monitor_dumps").iterdir())
    assert folders == ["step_000000", "step_000002", "step_000004"]
    record = json.loads((aligned / "monitor_dumps" / "step_000002" / "sample_00.json").read_text())
    assert record["target"].endswith("]}<|im_end|>")
    names = {path.suffix for path in (aligned / "monitor_dumps" / "step_000002").iterdir()}
    assert names == {".json", ".md", ".html", ".png"}


def test_the_pipeline_is_announced_with_its_checksum(aligned):
    resolved = json.loads((aligned / "resolved_config.json").read_text())
    checksum = resolved["pipeline"]["checksum"]
    modules = "token_ce x 1 in A+B; bbox_geo x 1 in A+B; coord_reg x 1 in A+B; coord_diag x 1 in A+B"
    console = (aligned / "console.txt").read_text()
    assert f"stage2_rollout_aligned: pipeline_checksum {checksum}; modules: {modules}." in console
    assert "The best checkpoint is the one with the greatest eval_rollout/f1." in console


def test_atoms_sum_to_the_loss_at_every_step_of_a_mixed_run(taught_model, scenes, outlined, tmp_path):
    sections = two_channel(0.3, n_softctx_iter=2) | {"debug": {"enabled": True}}
    records = steps(
        train(
            taught_model,
            scenes,
            tmp_path / "run",
            "stage2_two_channel",
            sections,
            max_steps=10,
            dataset=outlined,
        )
    )
    channels = ["B" if record["stage2/channel_b"] else "A" for record in records]
    assert "".join(channels) == "AAABAABAAB"
    for record, channel in zip(records, channels, strict=True):
        found = atoms(record)
        assert sum(found.values()) == pytest.approx(record["loss"], rel=1e-5)
        assert {key.split("/")[1][0] for key in found} == {channel}
        rollout_like = [key for key in record if "rollout" in key]
        assert bool(rollout_like) == (channel == "B"), rollout_like
    assert records[-1]["stage2_ab/b_ratio_realized"] == pytest.approx(0.3)
    a_step = records[0]
    assert {key.split("/")[1] for key in atoms(a_step)} == {"A1_text", "A2_text", "A2_coord"}
    assert {key.split("/")[1] for key in a_step if key.startswith("coord_diag/")} == {"A1", "A2"}


def test_all_rollouts_is_the_rollout_aligned_trainer(aligned, taught_model, scenes, tmp_path):
    records = steps(
        train(taught_model, scenes, tmp_path / "run", "stage2_two_channel", two_channel(1.0), max_steps=5)
    )
    assert not any("A" in key.split("/")[1][:1] for record in records for key in atoms(record))
    assert not any(key.startswith("coord_diag/A") for record in records for key in record)
    expected = steps(payloads(aligned, "train"))
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert atoms(ours) == pytest.approx(atoms(theirs), rel=1e-6)


def test_no_rollouts_at_all_is_plain_teacher_forcing(taught_model, scenes, outlined, tmp_path):
    sections = two_channel(0.0, rollout_matching={"packing": False})
    (record,) = steps(
        train(
            taught_model,
            scenes,
            tmp_path / "run",
            "stage2_two_channel",
            sections,
            max_steps=1,
            dataset=outlined,
        )
    )
    assert not [key for key in record if "rollout" in key or "/B" in key]
    assert not [key for key in record if key.startswith("coord_diag/A2")]
    # One iteration: the text loss is the cross-entropy of text tokens that stage 1 logs for the same batch, and the
    # coordinates of boxes and outlines are those of stage 1.
    stage1 = steps(
        train(taught_model, scenes, tmp_path / "stage1", "stage1_coord", {}, max_steps=1, dataset=outlined)
    )[0]
    text = record["loss/A1_text/struct_ce"] + record["loss/A1_text/desc_ce"]
    assert text == pytest.approx(stage1["base_ce/loss"], rel=1e-5)
    assert record["coord_diag/A1/expected_bin_mae"] == pytest.approx(
        stage1["coord_diag/expected_bin_mae"], rel=1e-5
    )
    assert record["coord_diag/A1/coord_tokens_total"] == stage1["coord_diag/coord_tokens"]


@pytest.mark.vllm
def test_an_engine_in_the_training_process_gives_the_run_of_transformers(taught_model, scenes, tmp_path):
    """vLLM answers with the weights of each step, so the losses are those of `backend: hf`."""
    require_vllm()
    engine = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    runs = {}
    for backend, more in (("hf", {}), ("vllm", {"vllm": engine})):
        sections = rollout_aligned(backend=backend, **more)
        runs[backend] = steps(
            train(taught_model, scenes, tmp_path / backend, "stage2_rollout_aligned", sections, max_steps=4)
        )
    for ours, theirs in zip(runs["vllm"], runs["hf"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["rollout/gen_new_tokens_total"] == theirs["rollout/gen_new_tokens_total"]
        assert ours["rollout/f1"] == theirs["rollout/f1"]


def test_every_step_has_the_same_number_of_samples(taught_model, scenes, tmp_path):
    """8 scenes in steps of 3: an epoch is 3 whole steps."""
    sections = two_channel(0.0)
    records = steps(
        train(
            taught_model, scenes, tmp_path / "run", "stage2_two_channel", sections, max_steps=4,
            per_device_train_batch_size=3,
        )
    )  # fmt: skip
    assert [record["train/samples_total"] for record in records] == [3, 3, 3, 3]
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3], abs=0.01)
