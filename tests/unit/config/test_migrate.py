"""`coordexp config migrate`: run files of the research code's shape become ours without a hand edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordexp.cli.main import main
from coordexp.config import load_run_config
from coordexp.config.checks.research import rule_of
from coordexp.config.checks.yaml_tree import parse_yaml, read_yaml
from coordexp.config.migrate import Migration, migrate, report, to_yaml
from coordexp.config.migrate.augmentation import CROP_NOTE
from coordexp.config.migrate.notes import NoteKind
from coordexp.config.migrate.prompts import COCO_80
from coordexp.config.schema.augmentation import OPERATIONS, Augmentation
from coordexp.config.schema.prompt import DEFAULT_PROMPT
from coordexp.errors import ConfigError
from coordexp.metrics.best import best_metric_problems

FIXTURES = Path(__file__).parents[2] / "fixtures" / "migrate"


def migrated(text: str) -> Migration:
    return migrate(parse_yaml(text, "old.yaml"))


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[part]
    return data


# file -> values of the result, and the defaults that had to be written out
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage1/full.yaml": (
        {
            "tuner.tuner_type": "full",
            "training.save_delay_steps": 1200,
            "training.save_last_epoch": True,
            "training.packing": True,
            "training.eval_packing": True,
            "training.lr_scheduler_kwargs": {"min_lr": 1e-6},
            "training.metric_for_best_model": "eval_token_acc",
            "template.truncation_strategy": "raise",
            "data.dataloader_num_workers": 16,
            "debug.val_sample_limit": 1000,
            "custom.coord_soft_ce_w1.target_truncate": 16,
            "deepspeed": {"enabled": True, "config": "zero2"},
        },
        {"custom.coord_soft_ce_w1.gate_weight": 1.0},
    ),
    "stage1/dlora.yaml": (
        {
            "tuner.tuner_type": "lora",
            "tuner.use_dora": True,
            "training.optimizer": "multimodal",
            "custom.coord_offset": {
                "enabled": True, "tie_head": True, "embed_lr": 1e-4, "weight_decay": 0.0
            },
            "custom.coord_soft_ce_w1.gate_weight": 5.0,
            "debug.train_sample_limit": 512,
            "global_max_length": 12000,
        },
        {},
    ),
    "stage1/dlora_ce.yaml": (
        {
            "custom.coord_soft_ce_w1.enabled": False,
            "training.output_dir": "output/dlora_ce",
            "training.packing": False,
            "training.run_name": "epoch_2-softce_w1",  # from the first of three files
            "tuner.lora_rank": 16,  # from the second
        },
        {},
    ),
    "stage1/debug.yaml": (
        {
            "training.output_dir": "output/debug",
            "debug": {"enabled": True, "train_sample_limit": 128, "val_sample_limit": 32},
            "training.save_strategy": "no",
            "deepspeed.enabled": False,
        },
        {},
    ),
    "two_channel/base.yaml": (
        {
            "rollout_matching.backend": "hf",
            "rollout_matching.packing": True,
            "rollout_matching.matching": {
                "candidate_top_k": 5, "maskiou_gate": 0.3, "maskiou_resolution": 256, "fp_cost": 0.5, "fn_cost": 2,
                "ot_cost": "l2", "ot_epsilon": 10, "ot_iters": 3,
            },
            "rollout_matching.monitor_dump": {
                "enabled": True, "every_steps": 80, "max_events": 200, "max_samples": 10, "max_text_chars": 0
            },
            "stage2_ab.schedule.b_ratio": 0.05,
        },
        {
            "rollout_matching.decode_batch_size": 1,
            "rollout_matching.max_new_tokens": 512,
            "rollout_matching.eval_detection.enabled": True,
            "rollout_matching.eval_detection.score_mode": "constant",
            "stage2_ab.n_softctx_iter": 2,
            "stage2_ab.coord_ctx_embed_mode": "st",
        },
    ),
    "two_channel/mixed_st.yaml": (
        {
            "rollout_matching.packing": False,
            "rollout_matching.eval_detection": {
                "enabled": True, "metrics": "coco", "iou_type": "bbox", "score_mode": "constant"
            },
            "stage2_ab.n_softctx_iter": 1,
            "stage2_ab.coord_ctx_embed_mode": "soft",
            "stage2_ab.softctx_grad_mode": "em_detach",
            "training.effective_batch_size": 12,
        },
        {},
    ),
    "two_channel/server.yaml": (
        {
            "rollout_matching.vllm": {
                "mode": "server",
                "server": {
                    "timeout_s": 240.0,
                    "infer_timeout_s": None,
                    "servers": [
                        {"base_url": "http://127.0.0.1:8000", "group_port": 51216},
                        {"base_url": "http://127.0.0.1:8010", "group_port": 51226},
                    ],
                },
            }
        },
        {},
    ),
    "two_channel/server_smoke.yaml": (
        {
            "training.max_steps": 2,
            "training.output_dir": "output/smoke",
            "debug.val_sample_limit": 8,
            "rollout_matching.monitor_dump.max_events": 0,
            "stage2_ab.schedule.b_ratio": 1.0,
        },
        {},
    ),
    "aligned/colocate.yaml": (
        {
            "custom.prompt": "List every object.",
            "template.system": "You are a detector.",
            "rollout_matching.vllm.engine_args": {
                "max_num_batched_tokens": 16384, "enable_chunked_prefill": True, "disable_chunked_mm_input": True,
                "limit_mm_per_prompt": {"image": 1, "video": 0}, "mm_encoder_tp_mode": "weights",
                "skip_mm_profiling": True,
            },
        },
        {
            "rollout_matching.decode_batch_size": 1,
            "rollout_matching.eval_detection.enabled": True,
            "rollout_matching.eval_detection.score_mode": "constant",
            "rollout_matching.vllm.enable_prefix_caching": True,
        },
    ),
    "aligned/semantic.yaml": (
        {
            "custom.trainer_variant": "stage2_rollout_aligned",
            "rollout_matching.decode_batch_size": 2,
            "rollout_matching.matching.candidate_top_k": 5,
            "rollout_matching.decoding.temperature": 0.7,
            "rollout_matching.eval_detection.iou_type": "segm",
            "rollout_matching.desc_monitor.batch_size": 32,
            "rollout_matching.desc_monitor.max_length": 64,
            "rollout_matching.desc_monitor.semantic_device": "auto",
        },
        {
            "rollout_matching.eval_detection.enabled": True,
            "rollout_matching.desc_monitor.mode": "semantic",
            "rollout_matching.vllm.enable_prefix_caching": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs_migrate_without_a_hand_edit(name: str, tmp_path: Path, capsys) -> None:
    expected, defaults = RUNS[name]
    assert main(["config", "migrate", "--report", str(FIXTURES / name)]) == 0
    text = capsys.readouterr().out
    (tmp_path / "ours.yaml").write_text(text)
    assert main(["config", "check", str(tmp_path / "ours.yaml")]) == 0
    load_run_config(tmp_path / "ours.yaml", checks=(best_metric_problems,))
    data = yaml.safe_load(text)
    assert {path: at(data, path) for path in expected} == expected
    assert {path: at(data, path) for path in defaults} == defaults
    written_out = [
        note.path for note in migrate(read_yaml(FIXTURES / name)).notes if note.kind is NoteKind.DEFAULT
    ]
    assert sorted(written_out) == sorted(defaults)
    for path, value in defaults.items():
        assert f"#   {path}: {json.dumps(value)}; ours is " in text
    assert text.count("# default of the research code\n") == len(defaults)


def test_every_fixture_is_tried() -> None:
    assert {str(path.relative_to(FIXTURES)) for path in FIXTURES.rglob("*.yaml")} == set(RUNS)
    assert len(RUNS) == 10


def keys() -> list[tuple[str, Any]]:
    lines = [line for line in (FIXTURES / "keys.txt").read_text().splitlines() if not line.startswith("#")]
    return [(key, json.loads(value)) for key, value in (line.split(" ", 1) for line in lines)]


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("key", "value"), keys(), ids=[key for key, _ in keys()])
def test_no_key_of_the_research_code_is_unknown(key: str, value: Any) -> None:
    """Each is carried, moved, dropped with a reason, or refused as something that is not here."""
    migration = migrated(yaml.safe_dump(nested(key, value)))
    noted = {note.path: note for note in migration.notes}
    section = key.split(".")[0]
    if rule_of(key) is None:
        assert section in ("model", "template", "data", "tuner", "training")
        assert value is None or at(migration.out.data, ".".join(key.split(".")[:2])) is not None
    elif key not in noted:
        assert rule_of(key).fate == "kept"
    else:
        assert noted[key].text.endswith(".") or noted[key].text.startswith("now ")


DISTILLED = """\
custom: {trainer_variant: gkd_monitor, train_jsonl: a.jsonl, visual_kd: {enabled: true, vit: {enabled: true}}}
rlhf: {rlhf_type: gkd}
"""


def test_what_is_not_here_stops_the_migration_unless_told(tmp_path: Path, capsys) -> None:
    (tmp_path / "old.yaml").write_text(DISTILLED)
    assert main(["config", "migrate", str(tmp_path / "old.yaml")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "custom.visual_kd.enabled" in said.err
    assert "rlhf.rlhf_type" in said.err
    assert "there is no gkd_monitor here" in said.err
    assert main(["config", "migrate", "--lossy", "--report", str(tmp_path / "old.yaml")]) == 0
    result = capsys.readouterr().out
    assert yaml.safe_load(result)["custom"] == {
        "train_jsonl": "a.jsonl", "coord_soft_ce_w1": {"enabled": False}
    }  # fmt: skip
    assert "# Cannot be carried over:" in result


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("custom: {augmentation: {enabled: false, bypass_prob: 0.1, ops: [{name: rotate}]}}\n", []),
        (
            "custom: {augmentation: {enabled: true, ops: [{name: rotate}, {name: hsv, params: {prob: 0.1}}]}}\n",
            ["custom.augmentation.ops"],
        ),
        ("custom: {visual_kd: {enabled: false, vit: {enabled: true}}}\n", []),
        ("custom: {emit_norm: none, json_format: standard, val_sample_with_replacement: false}\n", []),
        ("custom: {emit_norm: norm100}\n", ["custom.emit_norm"]),
        ("custom: {extra: {prompt_variant: other}}\n", ["custom.extra.prompt_variant"]),
    ],
)
def test_only_what_is_asked_for_is_lost(text: str, lost: list[str]) -> None:
    assert [note.path for note in migrated(text).lost][: len(lost)] == lost
    assert bool(migrated(text).lost) == bool(lost)


def test_keys_that_nobody_knows_are_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        migrated("training: {learning_rat: 1e-4}\nrollout_matching: {max_new_token: 4}\ncustom: {zzz: 1}\n")
    assert str(caught.value).splitlines() == [
        "3 problems:",
        "  training.learning_rat in old.yaml:1: neither the research code nor coordexp has such a key; did you mean "
        "training.learning_rate?",
        "  rollout_matching.max_new_token in old.yaml:2: neither the research code nor coordexp has such a key; did "
        "you mean rollout_matching.max_new_tokens?",
        "  custom.zzz in old.yaml:3: neither the research code nor coordexp has such a key.",
    ]


def test_the_flat_form_is_ours_already() -> None:
    with pytest.raises(ConfigError, match=r"external_plugins in old\.yaml:1: this is ms-swift's flat form"):
        migrated("external_plugins: [coordexp/plugin.py]\nmodel: m\n")


def test_keys_of_ours_stay_as_they_are() -> None:
    migration = migrated(
        "custom: {head: plain, trainer_variant: stage2_rollout_aligned}\n"
        "rollout_matching: {matching: {maskiou_gate: 0.5}, backend: hf}\n"
    )
    assert migration.get("custom.head") == "plain"
    assert migration.get("rollout_matching.matching.maskiou_gate") == 0.5
    assert migration.get("rollout_matching.backend") == "hf"


def test_limits_of_a_debug_section_that_is_off_had_no_effect() -> None:
    off = migrated(
        "debug: {enabled: false, output_dir: o, train_sample_limit: 4}\ncustom: {val_sample_limit: 9}\n"
    )
    assert off.out.data["debug"] == {"val_sample_limit": 9}
    assert off.get("training.output_dir") is None


def test_accumulation_is_rounded_up_as_there() -> None:
    migration = migrated("training: {effective_batch_size: 10, per_device_train_batch_size: 4}\n")
    assert migration.get("training.effective_batch_size") == 12
    (note,) = [note for note in migration.notes if note.kind is NoteKind.CHANGED]
    assert note.path == "training.effective_batch_size"


def test_a_prompt_that_no_file_holds_is_said() -> None:
    assert len(COCO_80.split(", ")) == len(set(COCO_80.split(", "))) == 80
    (note,) = [note for note in migrated("custom: {train_jsonl: a}\n").notes if note.kind is NoteKind.LOOK]
    assert note.path == "custom.prompt"
    assert not [n for n in migrated("custom: {user_prompt: Go.}\n").notes if n.kind is NoteKind.LOOK]


def test_the_report_names_where_each_key_was_written() -> None:
    lines = list(report(migrate(read_yaml(FIXTURES / "two_channel" / "server.yaml"))))
    server, base = (FIXTURES / "two_channel" / name for name in ("server.yaml", "base.yaml"))
    assert f"  rollout_matching.rollout_backend ({server}:3): now rollout_matching.backend" in lines
    assert f"  rollout_matching.maskiou_gate ({base}:89): now rollout_matching.matching.maskiou_gate" in lines
    assert (
        "  rollout_matching.vllm.sync.mode, rollout_matching.vllm.sync.fallback_to_full: weights are always pushed "
        "whole, adapters merged into them." in lines
    )


def test_the_result_can_be_written_to_a_file(tmp_path: Path, capsys) -> None:
    file = FIXTURES / "aligned" / "colocate.yaml"
    assert main(["config", "migrate", str(file), "--output", str(tmp_path / "ours.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "4 defaults written out, 12 renamed, 3 dropped; --report says which" in printed.err
    assert (tmp_path / "ours.yaml").read_text() == to_yaml(migrate(read_yaml(file)), "colocate.yaml")


def test_a_result_that_is_no_run_needs_a_hand(tmp_path: Path, capsys) -> None:
    (tmp_path / "old.yaml").write_text("custom: {trainer_variant: stage2_two_channel}\n")
    assert main(["config", "migrate", str(tmp_path / "old.yaml")]) == 2
    printed = capsys.readouterr()
    assert "the result needs a hand: " in printed.err
    assert "stage2_ab.pipeline" in printed.err
    assert yaml.safe_load(printed.out)["custom"] == {"trainer_variant": "stage2_two_channel"}


# what `config check` says of the research code's keys


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rollout_matching: {maskiou_gate: 0.3}\n", "now rollout_matching.matching.maskiou_gate."),
        ("rollout_matching: {rollout_backend: hf}\n", "now rollout_matching.backend."),
        (
            "rollout_matching: {vllm: {max_num_batched_tokens: 8}}\n",
            "now rollout_matching.vllm.engine_args.max_num_",
        ),
        (
            "rollout_matching: {eval_detection: {use_segm: true}}\n",
            "now rollout_matching.eval_detection.iou_type.",
        ),
        ("custom: {train_sample_limit: 3}\n", "now debug.train_sample_limit."),
        ("custom: {user_prompt: x}\n", "now custom.prompt."),
        ("custom: {json_format: standard}\n", "custom.answer_format says how answers are written."),
        ("training: {packing_mode: static}\n", "packs are made once from the lengths of all samples."),
        ("training: {save_safetensors: true}\n", "checkpoints are always safetensors."),
        ("custom: {head: auto}\nprompts: {system: x, user: y}\n", "now template.system."),
        ("custom: {head: auto}\nrlhf: {rlhf_type: gkd}\n", "there is no distillation here."),
    ],
)
def test_the_check_names_the_right_key(tmp_path: Path, capsys, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["config", "check", str(tmp_path / "run.yaml")]) == 2
    printed = capsys.readouterr().err
    assert f"a key of the research code; {said}" in printed
    assert printed.rstrip().endswith(
        f"`coordexp config migrate {tmp_path}/run.yaml` rewrites the whole file."
    )


def test_a_name_that_stands_elsewhere_is_looked_for_there(tmp_path: Path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("custom: {max_new_tokens: 3}\n")
    assert main(["config", "check", str(tmp_path / "run.yaml")]) == 2
    assert "custom.max_new_tokens in" in (said := capsys.readouterr().err)
    hint = "did you mean custom.rollout_eval.max_new_tokens or rollout_matching.max_new_tokens or "
    assert hint in said


def test_augmentation_of_the_research_code_is_ours(tmp_path: Path) -> None:
    text = """
custom:
  augmentation:
    enabled: true
    bypass_prob: 0.1
    ops:
    - {name: hflip, params: {prob: 0.5}}
    - {name: random_crop, params: {prob: 0.1, scale: [0.88, 1.0], aspect_ratio: [0.95, 1.05], min_coverage: 0.4,
       completeness_threshold: 0.95, min_objects: 4}}
    - {name: resize_by_scale, params: {lo: 0.95, hi: 1.05, align_multiple: 32, prob: 0.4}}
    - {name: color_jitter, params: {brightness: [0.95, 1.05], contrast: [0.95, 1.05], prob: 0.2}}
    - {name: hsv, params: {hue_delta_deg: [-3, 3], sat: [0.98, 1.02], val: [0.98, 1.02], prob: 0.1}}
    - {name: gamma, params: {gamma: [0.95, 1.05], prob: 0.05}}
    - {name: sharpness, params: {factor: [0.95, 1.08], prob: 0.05}}
    - {name: auto_contrast, params: {cutoff: 0, prob: 0.05}}
    - {name: clahe, params: {clip_limit: 1.5, tile_grid_size: [8, 8], prob: 0.04}}
    curriculum:
      phases:
      - {until_percent: 20, bypass_prob: 0.2, ops: {random_crop: {prob: 0.1, scale: [0.9, 0.98]}, rotate: {prob: 0.2}}}
      - {until_percent: 100, ops: {hsv: {prob: 0.1, hue_delta_deg: [-4, 4]}}}
"""
    found = migrated(text)
    assert [(note.kind.name, note.text) for note in found.notes if note.path.startswith("custom.augmentation")] == [
        ("LOST", f"clahe: no such operation; known: {', '.join(OPERATIONS)}."),
        ("DROPPED", "random_crop.completeness_threshold: not taken by these operations here."),
        ("LOOK", CROP_NOTE),
        ("LOST", "rotate: the box of a turned object is not tight, so boxes would be wrong."),
    ]  # fmt: skip
    settings = Augmentation.model_validate(found.get("custom.augmentation"))
    assert [op.name for op in settings.ops][:3] == ["hflip", "random_crop", "resize_by_scale"]
    assert settings.curriculum is not None
    first = settings.in_phase(settings.curriculum.phases[0])
    assert (first.bypass_prob, first.ops[1].params.scale, first.ops[1].params.min_objects) == (
        0.2,
        [0.9, 0.98],
        4,
    )


def test_the_prompt_of_evaluation_is_written_out(tmp_path: Path) -> None:
    text = (FIXTURES / "aligned/colocate.yaml").read_text()
    for old, key in (("rollout_matching", "eval_prompt_variant"), ("custom", "eval_prompt_variant")):
        data = yaml.safe_load(text)
        data.setdefault(old, {})[key] = "coco_80"
        found = migrated(yaml.safe_dump(data))
        assert found.get("custom.prompt_variants") == {
            "coco_80": f"{DEFAULT_PROMPT} Use only these names: {COCO_80}."
        }
        assert found.get("rollout_matching.eval_prompt_variant") == "coco_80"
        assert found.get("custom.prompt") == "List every object."
        (tmp_path / "ours.yaml").write_text(to_yaml(found, "old.yaml"))
        assert load_run_config(tmp_path / "ours.yaml").sections.rollout_matching is not None
    data["rollout_matching"]["eval_prompt_variant"] = "of_somebody"
    del data["custom"]["eval_prompt_variant"]
    [lost] = migrated(yaml.safe_dump(data)).lost
    assert (lost.path, "of_somebody" in lost.text) == ("rollout_matching.eval_prompt_variant", True)
