"""The audit passes on sound recipes, and each planted fault fails on its own line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.audit import run_file, start_warm
from support.processes import ROOT, run_coordexp
from support.stage2 import two_channel
from support.vllm import require_vllm

from coordexp.audit.findings import AuditLine
from coordexp.audit.run import Audit, Options
from coordexp.audit.run_equations import NOT_RECOMPUTED
from coordexp.audit.subject import Subject, load_subject

pytestmark = pytest.mark.slow

FAULTS_PLUGIN = ROOT / "tests" / "integration" / "planted_faults_plugin.py"
PACK = 256
QUESTIONS = {
    ("order", "recipe"), ("targets", "recipe"), ("prompts", "training = infer"), ("pixels", "training = infer"),
    ("prompts", "chat template"), ("answers", "stored = generated"), ("answers", "arg-max of a teacher-forced pass"),
    ("packing", "packed = single"), ("telemetry", "payload = float64"), ("weights", "checkpoint = plain transformers"),
}  # fmt: skip


def findings(run: Path, data: Path, work: Path) -> list[AuditLine]:
    subject = quick_subject(run, data, work)
    return Audit(subject, Options(other_packing=False, max_new_tokens=24)).findings()


def quick_subject(run: Path, data: Path, work: Path) -> Subject:
    """Short runs of it are started as `start_warm` says; those of commands, and of two ranks, as usual."""
    return replace(load_subject(run, data, samples=4, overrides=(), work=work), start=start_warm)


def failed(found: Sequence[AuditLine]) -> dict[tuple[str, str], str]:
    return {(one.area, one.question): one.detail for one in found if one.passed is False}


def test_a_sound_stage_1_recipe_passes_as_a_command(nano_model: Path, scenes: Path, tmp_path: Path):
    widths = {"target_sigma": [[0, 9.0], [2, 3.0]], "target_sigma_per_side": 0.03}
    run = run_file(tmp_path, nano_model, coordexp={"custom": {"coord_soft_ce_w1": widths}})
    report = tmp_path / "audit.json"
    done = run_coordexp(
        "audit", run, scenes / "train.jsonl", "--samples", 4, "--max-new-tokens", 24, "--output", report,
        "--keep", tmp_path / "kept",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["passed"] is True
    asked = {(one["area"], one["question"]): one for one in found["findings"] if one["passed"]}
    assert asked.keys() == QUESTIONS | {("order", "packed"), ("targets", "packed")}
    assert asked["order", "recipe"]["detail"] == "8 samples of 4 records on 1 rank(s)"
    again = run_coordexp("audit", tmp_path / "kept" / "run" / "checkpoint-2", tmp_path / "none.jsonl")
    assert again.returncode == 2
    assert "none.jsonl" in again.stderr


def test_a_sound_stage_2_recipe_passes_from_its_checkpoint(
    taught_model: Path, scenes: Path, tmp_path: Path, monkeypatch
):
    targets = {"replace_above_iou": 0.05, "drop_unmatched": True, "missed": "in_order"}
    sections = two_channel(0.5, {"max_new_tokens": 60, "targets": targets}, n_softctx_iter=2)
    sections["stage2_ab"]["pipeline"]["objective"][0]["config"]["rollout_matched_desc_weight"] = 0.5
    change_over_the_run(sections)
    run = run_file(
        tmp_path,
        taught_model,
        custom_trainer_variant="stage2_two_channel",
        coordexp=sections,
        logging_steps=1,
    )
    found = findings(run, scenes / "train.jsonl", tmp_path / "work")
    assert failed(found) == {}
    asked = {(one.area, one.question): one.detail for one in found if one.passed}
    assert asked.keys() == QUESTIONS | {("rollouts", "prompts"), ("rollouts", "weights of the step")}
    assert asked["rollouts", "weights of the step"] == "4 rollouts of steps [1]"


def change_over_the_run(sections: dict[str, Any]) -> None:
    """Widths and weights by points, and controllers that act."""
    token_ce, bbox_geo, coord_reg = sections["stage2_ab"]["pipeline"]["objective"]
    coord_reg["config"] |= {
        "target_sigma": [[0, 6.0], [2, 2.0]],
        "target_sigma_per_side": [[0, 0.05], [2, 0.01]],
    }
    token_ce["warmup"] = {"rollout_fn_desc_weight": [[0, 0.0], [2, 1.0]]}
    bbox_geo["warmup"] = {"weight": [[0, 0.2], [4, 1.0]]}
    coord_reg["warmup"] = {"w1_weight": [[0, 0.0], [4, 1.0]]}
    setpoint = {
        "kind": "setpoint", "target": 0.0, "effect": "lowers", "gain": 100.0, "rate": 0.1, "bounds": [0.1, 1.0],
        "mode": "act",
    }  # fmt: skip
    sections["control"] = {
        "controllers": [
            {"kind": "softctx_economy", "name": "forwards", "forced": 1, "observed": 0, "mode": "act"},
            {
                **setpoint,
                "name": "gate",
                "knob": "coord_reg.coord_gate_weight",
                "metric": "loss/A1_text/struct_ce",
            },
            {**setpoint, "name": "share", "knob": "b_ratio", "metric": "coord_diag/A1/expected_bin_mae"},
        ]
    }


FAULTS = {
    "shifted_labels": {
        ("targets", "recipe"): "is taught token",
        ("prompts", "training = infer"): "they part at token",  # the answer begins one token early
    },
    "swapped_images": {("pixels", "training = infer"): "its pixels are not those of the record's picture"},
    "wrong_count": {("telemetry", "payload = float64"): "base_ce/loss is"},
    "stale_template": {("prompts", "chat template"): "another chat template"},
    "bin_order": {
        ("targets", "recipe"): "is taught bin",
        ("telemetry", "payload = float64"): "also wrong: coord_diag/",  # of bins that are not the tokens'
    },
    "dropped_system": {("prompts", "training = infer"): "You find things"},
    "pixel_budget": {
        ("pixels", "training = infer"): "another pixel budget",
        ("prompts", "training = infer"): "they part at token",  # fewer image tokens
    },
}
"""What is planted -> the lines that fail, and their words."""


@pytest.mark.parametrize(
    "faults",
    [
        ("shifted_labels", "swapped_images", "wrong_count", "stale_template"),
        ("bin_order", "pixel_budget"),
        ("dropped_system",),
    ],
    ids="+".join,
)
def test_planted_faults_fail_on_their_lines_and_on_no_others(
    nano_model: Path, scenes: Path, tmp_path: Path, monkeypatch, faults
):
    monkeypatch.setenv("PLANTED_FAULTS", ",".join(faults))
    run = run_file(tmp_path, nano_model, plugins=[FAULTS_PLUGIN])
    subject = quick_subject(run, scenes / "train.jsonl", tmp_path / "work")
    audit = Audit(subject, Options(other_packing=False, max_new_tokens=24))
    if "stale_template" in faults:
        assert audit.run.plans
        (audit.checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    found = failed(audit.findings())
    expected = {line: words for fault in faults for line, words in FAULTS[fault].items()}
    assert found.keys() == expected.keys(), found
    for line, words in expected.items():
        assert words in found[line], found
    if "wrong_count" in faults:
        assert "also wrong" not in found["telemetry", "payload = float64"]


def test_a_lost_weight_push_fails_on_its_line(taught_model: Path, scenes: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PLANTED_FAULTS", "lost_push")
    sections = two_channel(1.0, {"max_new_tokens": 60})
    run = run_file(
        tmp_path, taught_model, plugins=[FAULTS_PLUGIN], custom_trainer_variant="stage2_two_channel",
        coordexp=sections, learning_rate=0.02,
    )  # fmt: skip
    found = failed(findings(run, scenes / "train.jsonl", tmp_path / "work"))
    assert found.keys() == {("rollouts", "weights of the step")}
    assert "a fresh process" in found["rollouts", "weights of the step"]


def test_packs_on_two_ranks_hold_every_record_once_an_epoch(
    nano_model: Path, scenes: Path, tmp_path: Path, monkeypatch
):
    """Shuffled, packed and spread over two gloo processes; the numbers are those of both ranks."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = run_file(
        tmp_path, nano_model, coordexp={"training": {"packing": True}}, packing_length=PACK,
        per_device_train_batch_size=1, lazy_tokenize=False,
    )  # fmt: skip
    subject = load_subject(run, scenes / "train.jsonl", samples=8, overrides=(), work=tmp_path / "work")
    audit = Audit(subject, Options(ranks=2, other_packing=False, max_new_tokens=8))
    found = audit.findings()
    assert failed(found) == {}
    packs = [forward["num_samples"] for plan in audit.ranks.plans for forward in plan["forwards"]]
    assert {plan["rank"] for plan in audit.ranks.plans} == {0, 1}
    assert max(packs) > 1
    telemetry = {one.question: one.detail for one in found if one.area == "telemetry"}
    assert "train_speed(s/it)" in telemetry["payload = float64, 2 ranks"]  # a clock, and named as such


@pytest.mark.vllm
def test_a_merged_lora_checkpoint_answers_in_vllm_as_it_does_in_hf(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    """Saved, loaded again, merged, and served by another engine; coordinate offsets are merged with it."""
    require_vllm()
    run = run_file(
        tmp_path, nano_model, tuner_type="lora", lora_rank=4, lora_alpha=8, target_modules=["all-linear"],
        learning_rate=0.02, coordexp={"custom": {"coord_offset": {"enabled": True}}},
    )  # fmt: skip
    report = tmp_path / "audit.json"
    done = run_coordexp(
        "audit", run, scenes / "train.jsonl", "--samples", 4, "--max-new-tokens", 24, "--output", report,
        "--recipe-only", "--backends", "vllm", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = {
        (one["area"], one["question"]): one["detail"] for one in json.loads(report.read_text())["findings"]
    }
    assert lines["prompts", "vllm, merged = hf"] == "4 prompts, by the ids that the backend returns"
    assert lines["pixels", "vllm, merged = hf"].endswith("as bytes: it normalises them inside the model")
    assert lines["answers", "vllm, merged = hf"].startswith("4 answers, token for token")
    telemetry = lines["telemetry", "payload = float64"]
    assert telemetry.startswith("step 1: ")  # the start of LoRA weights is random, and in no file
    found = re.match(r"step 1: (\d+) of (\d+) numbers", telemetry)
    assert found is not None
    assert int(found[2]) - int(found[1]) == sum(key in telemetry for key in NOT_RECOMPUTED)
