"""Values that no run can mean: each is refused by `config check`, with its key and what was expected."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from coordexp.config import load_run_config
from coordexp.config.run.effects import SWIFT_TUNERS
from coordexp.config.run.optimizers import OURS, SWIFT_OPTIMIZERS
from coordexp.config.run.values import CHOICES, DEEPSPEED, RANGES, SCHEDULERS
from coordexp.errors import ConfigError

PIPELINE = """\
    objective:
      - {name: bbox_geo, enabled: true, weight: 1.0, channels: [A, B], config: {smoothl1_weight: 1.0, ciou_weight: 1.0}}
"""


def aligned(rollout: str, backend: str = "hf") -> str:
    head = f"custom: {{trainer_variant: stage2_rollout_aligned}}\nrollout_matching:\n  backend: {backend}\n"
    return f"{head}  {rollout}\n  pipeline:\n{PIPELINE}"


def two_channel(b_ratio: str, rest: str = "n_softctx_iter: 1") -> str:
    head = "custom: {trainer_variant: stage2_two_channel}\nrollout_matching: {backend: hf}\nstage2_ab:\n"
    return f"{head}  schedule: {{b_ratio: {b_ratio}}}\n  {rest}\n  pipeline:\n{PIPELINE}"


def said_of(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    return str(caught.value).replace(f"{tmp_path}/", "")


OUTSIDE = {
    "in [0, 1]": ("-0.1", "1.5"),
    "in [0, 1)": ("-0.1", "1"),
    "at least 0": ("-1",),
    "at least 1": ("0", "-2"),
    "more than 0": ("0", "-1"),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_range_is_held_on_both_sides_and_against_nan(tmp_path: Path, name: str) -> None:
    allowed = str(RANGES[name])
    for value in (*OUTSIDE[allowed], ".nan", ".inf"):
        said = said_of(tmp_path, f"model: m\n{name}: {value}\n")
        assert f"{name} = " in said, value
        assert "in run.yaml:2: expected" in said, value


NOT_MEANT = [
    ("training: {learning_rate: nan}\n", 'training.learning_rate = "nan" in run.yaml:1: expected a number'),
    ("training: {learning_rate: 'NaN'}\n", 'training.learning_rate = "NaN" in run.yaml:1: expected a number'),
    ("training: {learning_rate: '-inf'}\n", "training.learning_rate"),
    ("training: {learning_rate: true}\n", "training.learning_rate = true in run.yaml:1: expected a number"),
    ("training: {learning_rate: [1e-4]}\n", "training.learning_rate"),
    ("training: {max_steps: 0}\n", "training.max_steps = 0 in run.yaml:1: expected at least 1, or -1"),
    ("training: {max_steps: -2}\n", "expected at least 1, or -1 for num_train_epochs."),
    ("training: {max_steps: 1.5}\n", "training.max_steps = 1.5 in run.yaml:1: expected an integer"),
    ("training: {save_steps: 2.5}\n", "expected whole steps, or a share of the run below 1."),
    ("training: {effective_batch_size: 7, per_device_train_batch_size: 2}\n", "expected a multiple of"),
    ("training: {effective_batch_size: 0}\n", "training.effective_batch_size = 0 in run.yaml:1: expected"),
    (
        "training: {stop_when: [{metric: eval_loss, op: '<', value: 2}], eval_strategy: 'no'}\n",
        "training.stop_when in run.yaml:1: is judged at evaluations, and there are none",
    ),
    ("training: {save_delay_steps: -1}\n", "training.save_delay_steps = -1 in run.yaml:1: expected"),
    ("training: {lr_scheduler_type: cosin}\n", "greedy (did you mean cosine?)."),
    ("training: {lr_scheduler_type: cosine_with_min_lr}\n", "needs one of min_lr and min_lr_rate"),
    ("training: {lr_scheduler_kwargs: {min_lr: -1}}\n", "min_lr: expected a number in [0, 1]."),
    ("training: {lr_scheduler_kwargs: {min_lr: .nan}}\n", "min_lr: expected a number in [0, 1]."),
    ("training: {eval_strategy: step}\n", "expected one of no, steps, epoch (did you mean steps?)."),
    ("training: {save_strategy: bst}\n", "expected one of no, steps, epoch, best"),
    ("model: {attn_impl: flash}\n", "expected one of eager, sdpa, flex_attention, flash_attn"),
    ("tuner: {tuner_type: lra}\n", "(did you mean lora?), or one that a file of external_plugins registers."),
    ("tuner: {target_modules: []}\n", "expected at least one; all-linear takes every linear layer."),
    ("training: {fp16: true, bf16: true}\n", "fp16 is true as well; keep one of them."),
    ("training: {label_smoothing_factor: 0.1}\n", "no objective here smooths its labels"),
    ("training: {loss_type: cross_entropy}\n", "the trainer variant decides the objective"),
    (
        "training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps}\n",
        "needs the same eval_strategy and save_strategy, found epoch and steps",
    ),
    (
        "training:\n  {load_best_model_at_end: true, eval_strategy: steps, save_strategy: steps, eval_steps: 20,"
        " save_steps: 30}\n",
        "needs save_steps to be a multiple of eval_steps, found 30 and 20.",
    ),
    ("custom: {head: auto}\ndeepspeed: zero9\n", "(did you mean zero3?), or a .json file."),
    ("custom: {head: auto}\ndeepspeed: {enabled: true}\n", "config is missing; give a name such as zero2"),
    ("model: m\ndeepspeed: {enabled: false}\n", "this is DeepSpeed's own configuration"),
    ("training: {output_dir: ''}\n", "expected a path; leave it out where none is meant."),
    ("model: {model: ''}\n", "expected a path"),
    ("custom: {train_jsonl: ''}\n", "custom.train_jsonl"),
    ("model: m\ndataset: ['']\n", "expected the path of a JSONL file."),
    ("custom: {min_pixels: 5000}\ntemplate: {max_pixels: 4000}\n", "5000 is more than max_pixels 4000."),
    ("custom: {coord_offset: {enabled: true, embed_lr: 50}}\n", "custom.coord_offset.embed_lr = 50 in"),
    ("custom: {coord_offset: {enabled: true, embed_lr: .nan}}\n", "custom.coord_offset.embed_lr"),
    ("custom: {coord_offset: {enabled: true, weight_decay: 5}}\n", "custom.coord_offset.weight_decay = 5 in"),
    ("custom: {coord_soft_ce_w1: {soft_ce_weight: 0, w1_weight: 0}}\n", "every weight is 0"),
    ("custom: {coord_soft_ce_w1: {w1_weight: .nan}}\n", "custom.coord_soft_ce_w1.w1_weight"),
    ("custom: {coord_soft_ce_w1: {target_sigma: .inf}}\n", "custom.coord_soft_ce_w1.target_sigma"),
    (aligned("max_new_tokens: 0"), "rollout_matching.max_new_tokens = 0 in run.yaml:4: expected"),
    (aligned("decoding: {temperature: .nan}"), "rollout_matching.decoding.temperature"),
    (aligned("decoding: {top_p: 1.5}"), "rollout_matching.decoding.top_p = 1.5 in"),
    (aligned("matching: {fp_cost: .nan}"), "rollout_matching.matching.fp_cost"),
    (aligned("decode_mode: beam"), "rollout_matching.num_beams in run.yaml:2: 1 with decode_mode: beam; give 2"),
    (aligned("offload: {enabled: true}"), "rollout_matching.offload.enabled in run.yaml:4: true moves nothing"),
    (aligned("offload: {enabled: true, offload_model: true}"), "backend hf generates with that model"),
    (
        aligned("max_new_tokens: 600\n  vllm: {max_model_len: 512}", "vllm"),
        "rollout_matching.vllm.max_model_len in run.yaml:5: 512 leaves no room for a prompt beside",
    ),
    (
        "custom: {val_jsonl: a.jsonl, rollout_eval: {enabled: true, backend: vllm, max_new_tokens: 600,\n"
        "  vllm: {max_model_len: 512}}}\n",
        "custom.rollout_eval.vllm.max_model_len in run.yaml:2: 512 leaves no room for a prompt beside "
        "custom.rollout_eval.max_new_tokens: 600",
    ),
    (aligned("vllm: {gpu_memory_utilization: 1.5}", "vllm"), "rollout_matching.vllm.gpu_memory_utilization = 1.5"),
    (two_channel("1.5"), "stage2_ab.schedule.b_ratio = 1.5 in run.yaml:4: expected"),
    (two_channel(".nan"), "stage2_ab.schedule.b_ratio = NaN in run.yaml:4: expected"),
    (two_channel("'nan'"), "stage2_ab.schedule.b_ratio"),
    (two_channel("0.5", "n_softctx_iter: 0"), "stage2_ab.n_softctx_iter = 0 in"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), NOT_MEANT)
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in said_of(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nattn_impl: kernels-community/flash-attn\n",
        "model: m\ndeepspeed: my/zero.json\n",
        "model: m\ndeepspeed: {zero_optimization: {stage: 2}}\n",
        "model: m\nlr_scheduler_type: cosine_warmup_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n",
        "model: m\nsave_steps: 0.1\neval_steps: 20\nload_best_model_at_end: true\n",
        "model: m\ntuner_type: mine\nexternal_plugins: [my_tuner.py]\n",
        "model: m\nlabel_smoothing_factor: 0\n",
        "custom: {coord_soft_ce_w1: {soft_ce_weight: 0, w1_weight: 0, enabled: false}}\n",
        "custom: {head: auto}\ndeepspeed: {enabled: false}\n",
    ],
)
def test_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    load_run_config(tmp_path / "run.yaml")


def test_lists_are_those_of_the_installed_packages() -> None:
    from swift.arguments.base_args.base_args import get_supported_tuners
    from swift.optimizers import optimizers_map
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    assert set(SCHEDULERS) == {kind.value for kind in SchedulerType}
    assert set(CHOICES["eval_strategy"]) == {kind.value for kind in IntervalStrategy}
    assert set(SWIFT_TUNERS) == set(get_supported_tuners())
    assert {*SWIFT_OPTIMIZERS, "muon"} == set(optimizers_map) - set(OURS)
    found = importlib.util.find_spec("swift")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0]) / "config"
    assert set(DEEPSPEED) == {path.stem for path in folder.glob("zero*.json")}
