"""Settings that cannot take effect and values that cannot be meant: refused with the key, the line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config
from coordexp.config.run.machine import missing_paths, package_problems, unknown_engine_args
from coordexp.config.schema.rollout import OUR_ENGINE_ARGS
from coordexp.errors import ConfigError
from coordexp.metrics.best import best_metric_problems

PIPELINE = """\
    objective:
      - {name: bbox_geo, enabled: true, weight: 1.0, channels: [A, B], config: {smoothl1_weight: 1.0, ciou_weight: 1.0}}
"""
ALIGNED = f"""\
custom: {{trainer_variant: stage2_rollout_aligned}}
rollout_matching:
  backend: hf
  pipeline:
{PIPELINE}"""
TWO_CHANNEL = f"""\
custom: {{trainer_variant: stage2_two_channel}}
rollout_matching: {{backend: hf}}
stage2_ab:
  schedule: {{b_ratio: 0.5}}
  pipeline:
{PIPELINE}"""


def problems_of(tmp_path: Path, text: str, *overrides: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file, overrides, checks=(best_metric_problems, package_problems))
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            TWO_CHANNEL.replace("b_ratio: 0.5", "b_ratio: [[0, 0.0], [9, 0]]").replace(
                "{backend: hf}", "{backend: hf, targets: {drop_unmatched: true}}"
            ),
            (),
            "rollout_matching.targets in run.yaml:2: changes what channel B teaches, but stage2_ab.schedule.b_ratio is "
            "0 throughout; remove it.",
        ),
        (
            ALIGNED.replace("_aligned}", "_aligned, object_ordering: random}").replace(
                "backend: hf", "backend: hf\n  targets: {missed: in_order}"
            ),
            (),
            "rollout_matching.targets.missed in run.yaml:4: in_order needs an order that a target keeps, but "
            "custom.object_ordering is random; use append, or object_ordering: sorted.",
        ),
        (
            ALIGNED.replace("backend: hf", "backend: hf\n  targets: {answers: best}"),
            (),
            "rollout_matching.targets.answers in run.yaml:4: best has no effect with num_return_sequences: 1; ask for "
            "more answers, or remove it.",
        ),
        (
            ALIGNED.replace("backend: hf", "backend: hf\n  targets: {replace_above_iou: 0.3}"),
            (),
            "rollout_matching.targets.replace_above_iou in run.yaml:4: 0.3 is not below matching.maskiou_gate 0.3, "
            "above which a prediction near a missed object is matched with it; lower it.",
        ),
        (
            ALIGNED.replace(
                "backend: hf",
                "backend: hf\n  targets: {drop_unmatched: true, drop_duplicates_above_iou: 0.5}",
            ),
            (),
            "rollout_matching.targets.drop_duplicates_above_iou in run.yaml:4: has no effect with drop_unmatched: "
            "true, by which duplicates leave too; remove one of them.",
        ),
        (
            TWO_CHANNEL.replace("{backend: hf}", "{backend: hf, coord_decode_mode: st}"),
            (),
            "rollout_matching.coord_decode_mode in run.yaml:2: has no effect with trainer variant stage2_two_channel, "
            "which reads stage2_ab.coord_decode_mode; write it there.",
        ),
        (
            ALIGNED.replace("_aligned}", "_aligned, rollout_eval: {enabled: true}}"),
            (),
            "custom.rollout_eval in run.yaml:1: has no effect in stage 2, whose evaluation asks the model anyway; "
            "remove it.",
        ),
        (
            "custom: {rollout_eval: {enabled: true}}\ntraining: {eval_strategy: steps}\n",
            (),
            "custom.rollout_eval in run.yaml:1: needs validation records (custom.val_jsonl, or val_dataset), and there "
            "are none.",
        ),
        (
            "custom: {val_jsonl: a.jsonl, rollout_eval: {enabled: true}}\ntraining: {eval_strategy: 'no'}\n",
            (),
            "custom.rollout_eval in run.yaml:1: has no effect with eval_strategy: no; set eval_strategy, or "
            "custom.rollout_eval.every_steps.",
        ),
        (
            "custom: {val_jsonl: a.jsonl, rollout_eval: {enabled: true, vllm: {max_num_seqs: 4}}}\n",
            (),
            "custom.rollout_eval in run.yaml:1: vllm has no effect with backend: hf; remove it, or use backend: vllm.",
        ),
        (
            "custom: {generation_samples: {num_images: 2}}\n",
            (),
            "custom.generation_samples in run.yaml:1: has no effect in stage 1 without custom.rollout_eval.enabled: "
            "true, since nothing is generated.",
        ),
        (
            "telemetry: {console: {every_steps: {level_2: 5}}}\ntraining: {logging_steps: 10}\n",
            (),
            "telemetry.console.every_steps.level_2 in run.yaml:1: 5 has no effect with logging_steps: 10, since a line "
            "needs a record; lower logging_steps.",
        ),
        (
            "telemetry: {trajectory_probe: {every_steps: 100}}\n",
            (),
            "telemetry.trajectory_probe in run.yaml:1: needs validation records (custom.val_jsonl, or val_dataset), "
            "and there are none.",
        ),
        (
            "telemetry: {trajectory_probe: {num_samples: 8}}\n",
            (),
            "telemetry.trajectory_probe in run.yaml:1: has no effect without every_steps; give it, or remove "
            "trajectory_probe",
        ),
        (
            "telemetry: {console: {level: 2, every_steps: {level_3: 20}}}\n",
            (),
            "telemetry.console in run.yaml:1: every_steps.level_3 has no effect below level 3; raise level, or "
            "remove it",
        ),
        (
            ALIGNED + "  vllm: {max_num_seqs: 4}\n",
            (),
            "rollout_matching.vllm in run.yaml:7: has no effect with backend: hf, which has no vLLM engine; remove it "
            "(over a file that is extended: vllm: null), or use backend: vllm.",
        ),
        (
            ALIGNED + "  num_return_sequences: 4\n",
            (),
            "rollout_matching in run.yaml:2: num_return_sequences is 4, but decoding.temperature is 0, which gives the "
            "same answer every time; set it above 0, or num_return_sequences: 1.",
        ),
        (
            ALIGNED + "  num_return_sequences: 0\n",
            (),
            "rollout_matching.num_return_sequences = 0 in run.yaml:7: expected",
        ),
        (
            ALIGNED.replace("aligned}", "aligned, prompt_variants: {short: Find all.}}")
            + "  eval_prompt_variant: shrt\n",
            (),
            "rollout_matching.eval_prompt_variant in run.yaml:7: custom.prompt_variants has no message called shrt; "
            "did you mean short?",
        ),
        (
            ALIGNED + "  eval_prompt_variant: coco_80\n",
            (),
            "custom.prompt_variants has no message called coco_80; it has none. Write it there.",
        ),
        (
            ALIGNED.replace("aligned}", "aligned, prompt_variants: {short: ''}}"),
            (),
            "custom.prompt_variants.short",
        ),
        (
            ALIGNED.replace("backend: hf", "backend: vllm\n  vllm: {sync: {mode: adapter}}"),
            (),
            'rollout_matching.vllm.sync.mode = "adapter" in run.yaml:4: adapters are merged and pushed as whole '
            "weights, never alone; use full.",
        ),
        (
            ALIGNED.replace("backend: hf", "backend: vllm\n  vllm: {engine_args: {max_num_seqs: 4}}"),
            (),
            "rollout_matching.vllm in run.yaml:4: engine_args.max_num_seqs cannot be set here: write "
            "vllm.max_num_seqs.",
        ),
        (
            ALIGNED.replace(
                "aligned}", "aligned, coord_soft_ce_w1: {target_sigma: 3.0}}"
            ),
            (),
            "custom.coord_soft_ce_w1 in run.yaml:1: is the objective of stage 1; that of stage2_rollout_aligned is "
            "rollout_matching.pipeline. Remove it.",
        ),
        (
            "training: {optimizer: multimodal_coord_offset}\n",
            (),
            'training.optimizer = "multimodal_coord_offset" in run.yaml:1: nobody registers an optimizer of that name; '
            "expected one of coord_adamw, coord_muon, default, galore, lorap, multimodal, muonclip (did you mean "
            "multimodal?), or one that a file of external_plugins registers.",
        ),
        (
            "custom: {coord_offset: {enabled: true}}\ntuner: {modules_to_save: [embed_tokens, lm_head]}\n",
            (),
            "custom.coord_offset in run.yaml:1: modules_to_save trains a whole copy of embed_tokens and lm_head, rows "
            "of coordinate tokens included; keep one of the two.",
        ),
        (
            "custom: {coord_offset: {enabled: true}}\ntuner: {use_dora: true, target_modules: [q_proj, lm_head]}\n",
            (),
            "custom.coord_offset in run.yaml:1: use_dora on lm_head scales rows without their offsets",
        ),
        (
            "training: {optimizer: muon}\n",
            (),
            "in run.yaml:1: ms-swift's muon clones its code from the network when training starts, and gives Muon all "
            "weights of two and more dimensions but embedding and head: fused qkv in one "
            "piece, patch convolution and position table, which are no hidden matrices. Use coord_muon.",
        ),
        (
            "training: {optimizer: coord_muon, optim: adamw_torch_8bit}\n",
            (),
            "has no effect with optimizer: coord_muon, whose AdamW is torch's; expected one of adamw_torch, "
            "adamw_torch_fused, or nothing.",
        ),
        (
            "training: {optimizer: coord_adamw}\ncustom: {optimizer: {muon: {lr_scale: 2.0}}}\n",
            (),
            "custom.optimizer.muon in run.yaml:2: has no effect without optimizer: coord_muon; set that, or remove it.",
        ),
        (
            "custom: {optimizer: {groups: [{patterns: ['*.bias']}]}}\n",
            (),
            "custom.optimizer.groups in run.yaml:1: has no effect without optimizer: coord_adamw or coord_muon",
        ),
        (
            "training: {optimizer: coord_muon}\ndeepspeed: zero3\n",
            (),
            "optimizer: coord_muon does not run under ZeRO-3, which keeps a slice of every weight on each rank and "
            "steps on those: Muon needs whole matrices, and what decays is known by shape. Use zero2.",
        ),
        (
            "training: {optimizer: coord_adamw}\ndeepspeed: {config: {zero_optimization: {stage: 3}}}\n",
            (),
            "optimizer: coord_adamw does not run under ZeRO-3, which keeps a slice of every weight on each rank and "
            "steps on those: what decays is known by shape. Use zero2.",
        ),
        (
            "training: {optimizer: coord_muon}\ndeepspeed: zero2_offload\n",
            (),
            "optimizer: coord_muon does not run with offload_optimizer",
        ),
        (
            "training: {optimizer: coord_muon}\ndeepspeed: zero0\n",
            (),
            "optimizer: coord_muon does not run with stage 0, where DeepSpeed puts copies",
        ),
        (
            "training: {optimizer: coord_adamw}\ndeepspeed: {config: {optimizer: {type: AdamW}}}\n",
            (),
            "the DeepSpeed configuration has an `optimizer`, which takes the place of optimizer: coord_adamw",
        ),
        (
            "training: {optimizer: coord_muon, fsdp: fsdp2}\n",
            (),
            "optimizer: coord_muon does not run under FSDP, which hands it pieces of flattened weights: Muon needs "
            "whole matrices, and what decays is known by shape. Use DDP, or deepspeed: zero2.",
        ),
        (
            "model: {model: m}\ntraining:\n  create_checkpoint_symlink: true\n",
            (),
            "training.create_checkpoint_symlink = true in run.yaml:3: the link `best` in the run folder is kept by "
            "coordexp at every save, and ms-swift's would fail on it at the end of the run; remove it.",
        ),
        (
            "training:\n  metric_for_best_model: rollout/f1\n",
            (),
            'training.metric_for_best_model = "rollout/f1" in run.yaml:2: the evaluation of trainer variant '
            "stage1_coord reports no such number.",
        ),
        (
            ALIGNED,
            ("--greater_is_better", "false"),
            "greater_is_better = false on the command line: rollout/f1 is better when higher, but greater_is_better "
            "is false; remove greater_is_better.",
        ),
        ("training: {learning_rate: -1.0e-4}\n", (), "learning_rate = -0.0001 in run.yaml:1: expected a number in [0,"),
        ("training: {learning_rate: .nan}\n", (), "learning_rate = NaN in run.yaml:1: expected a number"),
        ("model: m\nlearning_rate: 1e5\n", (), "learning_rate = 100000.0 in run.yaml:2: expected a number in [0, 1]."),
        ("training: {weight_decay: .inf}\n", (), "weight_decay = Infinity in run.yaml:1: expected a number"),
        ("training: {warmup_ratio: 3}\n", (), "training.warmup_ratio = 3 in run.yaml:1: expected a number in [0, 1]."),
        ("training: {adam_beta2: 1.0}\n", (), "adam_beta2 = 1.0 in run.yaml:1: expected a number in [0, 1)."),
        ("tuner: {lora_rank: 0}\n", (), "tuner.lora_rank = 0 in run.yaml:1: expected a number at least 1."),
        ("training: {num_train_epochs: 0}\n", (), "expected a number more than 0."),
        ("training: {max_steps: 0}\n", (), "expected at least 1, or -1 for num_train_epochs."),
        (
            "training: {per_device_train_batch_size: 0, effective_batch_size: 8}\n",
            (),
            "training.per_device_train_batch_size = 0 in run.yaml:1: expected a number at least 1.",
        ),
        ("training: {report_to: [tensorbord]}\n", (), "no tracker is called tensorbord; did you mean tensorboard?"),
        ("training: {report_to: [comet_ml]}\n", (), "comet_ml is not installed; install comet_ml, or leave it out."),
        ("training: {optim: adamw_8bit}\n", (), "needs the package bitsandbytes, which is not installed."),
        ("ENV: [A=1]\nmodel: m\n", (), 'ENV = ["A=1"] in run.yaml:1: expected a mapping of variables'),
        ("ENV: {A: [1]}\nmodel: m\n", (), "ENV.A = [1] in run.yaml:1: expected text."),
    ],
)  # fmt: skip
def test_refused_with_a_sentence(tmp_path: Path, text: str, overrides: tuple[str, ...], said: str) -> None:
    assert said in problems_of(tmp_path, text, *overrides)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (ALIGNED + "  vllm: null\n", ()),
        (ALIGNED + "  coord_decode_mode: st\n", ()),
        (ALIGNED + "  num_return_sequences: 4\n  decoding: {temperature: 0.7}\n", ()),
        (
            ALIGNED.replace("aligned}", "aligned, prompt_variants: {short: Find all.}}")
            + "  eval_prompt_variant: short\n",
            (),
        ),
        ("model: m\nlearning_rate: 0.0\nweight_decay: 0\nmax_steps: -1\nreport_to: none\n", ()),
        ("model: m\noptimizer: multimodal\noptim: adamw_torch\n", ()),
        ("model: m\noptimizer: coord_adamw\noptim: adamw_torch\ndeepspeed: zero2_offload\n", ()),
        (
            "training: {optimizer: coord_muon}\ndeepspeed: zero2\n"
            "custom: {optimizer: {muon: {split: {'*.qkv.*': 3}}}}\n",
            (),
        ),
        ("training: {optimizer: coord_adamw}\ncustom: {optimizer: {groups: [{patterns: ['*']}]}}\n", ()),
        ("model: m\noptimizer: mine\nexternal_plugins: [my_optimizers.py]\n", ()),
        ("ENV: {OMP_NUM_THREADS: 1}\nmodel: m\n", ()),
    ],
)
def test_accepted(tmp_path: Path, text: str, overrides: tuple[str, ...]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    load_run_config(tmp_path / "run.yaml", overrides, checks=(best_metric_problems, package_problems))


def test_the_other_plugin_may_register_optimizers_ours_does_not(tmp_path: Path) -> None:
    text = "custom_trainer_variant: stage1\nexternal_plugins: [coordexp/plugin.py]\noptimizer: mine\n"
    assert "nobody registers an optimizer" in problems_of(tmp_path, text)


def test_every_problem_of_a_file_is_shown_at_once(tmp_path: Path) -> None:
    """Removed keys, wrong values, unknown keys, misplaced sections and wrong arguments in one reading."""
    text = """\
training:
  learning_rate: -1.0
  max_step: 3
custom:
  head: fast
  extra: {prompt_variant: coco_80}
rollout_matching:
  temperature: 0.5
  backend: hf
stage2_ab:
  n_softctx_iter: 0
ENV: [A]
"""
    said = problems_of(tmp_path, text)
    expected = {
        "training.learning_rate",
        "training.max_step",
        "custom.head",
        "custom.extra",
        "rollout_matching.temperature",
        "rollout_matching",
        "stage2_ab.n_softctx_iter",
        "stage2_ab.schedule",
        "stage2_ab.pipeline",
        "ENV",
    }
    lines = said.splitlines()
    assert lines[0] == "10 problems:"
    assert {line.split()[0].rstrip(":") for line in lines[1:]} == expected


def test_sections_that_are_wrong_are_not_called_missing(tmp_path: Path) -> None:
    text = ALIGNED.replace("backend: hf", "backend: hff")
    assert problems_of(tmp_path, text).startswith(
        'rollout_matching.backend = "hff" in run.yaml:3: expected one of'
    )


def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    text = """\
model: {model: runs/stage1/base/best}
training: {deepspeed: my_zero.json}
custom: {train_jsonl: data/train.jsonl, val_jsonl: data/val.jsonl}
"""
    (tmp_path / "run.yaml").write_text(text)
    config_problems: list[str] = []

    def collect(*args):
        config_problems.extend(map(str, missing_paths(*args)))
        return []

    load_run_config("run.yaml", checks=(collect,))
    assert config_problems == [
        'custom.val_jsonl = "data/val.jsonl" in run.yaml:3: does not exist.',
        'model.model = "runs/stage1/base/best" in run.yaml:1: does not exist.',
        'training.deepspeed = "my_zero.json" in run.yaml:2: does not exist.',
    ]


@pytest.mark.parametrize(
    ("model", "is_missing"),
    [
        ("owner/name", False),  # an id of a hub
        ("name", False),
        ("./name", True),
        ("/nowhere/name", True),
        ("a/b/c", True),
        ("here/name", True),  # the folder `here` exists
        ("here", False),
    ],
)
def test_which_models_are_looked_for(tmp_path, monkeypatch, model: str, is_missing: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = missing_paths("stage1_coord", None, {"model": model}, lambda name: (name, None))
    assert [str(problem) for problem in found] == [f'model = "{model}": does not exist.'] * is_missing


def test_engine_args_are_checked_against_the_installed_engine(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    text = ALIGNED.replace(
        "backend: hf",
        "backend: vllm\n  vllm: {engine_args: {max_num_batched_token: 8, limit_mm_per_prompt: {image: 1}}}",
    )
    assert problems_of(tmp_path, text) == (
        "rollout_matching.vllm.engine_args.max_num_batched_token: the installed vLLM has no such engine argument; did "
        "you mean max_num_batched_tokens?"
    )


def test_every_engine_arg_that_we_decide_is_one(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    assert unknown_engine_args(dict.fromkeys(OUR_ENGINE_ARGS)) == {}
