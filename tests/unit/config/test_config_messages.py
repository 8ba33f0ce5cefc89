"""One row per removed, misspelt or misused key, with the exact message."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config, parse_sections
from coordexp.config.schema.custom import Custom
from coordexp.errors import ConfigError

KNOWN_IN_COORD_LOSS = (
    "Known here: enabled, soft_ce_weight, w1_weight, ce_weight, gate_weight, temperature, target_sigma, "
    "target_sigma_per_side, target_truncate, monitor_mass, warmup."
)
CHANNEL_B = "channel B has one contract: rollout prefix, missed objects appended, one forward"
PIPELINE = "it is set per module in the pipeline"


def error_of(tmp_path: Path, text: str, *overrides: str) -> str:
    """The message for a run file with this text; its path is shortened to its name."""
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file, overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


REMOVED = [
    # written in YAML as section, then the rest of the dotted path
    ("stage2_ab.schedule.pattern", "use stage2_ab.schedule.b_ratio (share of channel-B steps)"),
    ("rollout_matching.rollout_buffer", "rollouts are generated for each optimizer step; remove it"),
    ("rollout_matching.temperature", "use rollout_matching.decoding.temperature"),
    ("rollout_matching.top_p", "use rollout_matching.decoding.top_p"),
    ("rollout_matching.top_k", "use rollout_matching.decoding.top_k"),
    ("custom.extra.rollout_matching.backend", "use the top-level section rollout_matching"),
    ("custom.extra.rollout_matching", "use the top-level section rollout_matching"),
    ("custom.extra", "write its keys under their own sections (rollout_matching, stage2_ab, custom)"),
    (
        "custom.coord_expectation_metrics",
        "expected-bin monitors are always logged (coord_diag/expected_bin_*)",
    ),
    ("stage2_ab.desc_ce_weight", f"{PIPELINE}: token_ce.config.desc_ce_weight"),
    ("stage2_ab.fmt_struct_ce_weight", f"{PIPELINE}: token_ce.config.self_context_struct_ce_weight"),
    ("stage2_ab.bbox_smoothl1_weight", f"{PIPELINE}: bbox_geo.config.smoothl1_weight"),
    ("stage2_ab.bbox_ciou_weight", f"{PIPELINE}: bbox_geo.config.ciou_weight"),
    ("stage2_ab.coord_ce_weight", f"{PIPELINE}: coord_reg.config.coord_ce_weight"),
    ("stage2_ab.coord_el1_weight", f"{PIPELINE}: coord_reg.config.coord_el1_weight"),
    ("stage2_ab.coord_ehuber_weight", f"{PIPELINE}: coord_reg.config.coord_ehuber_weight"),
    ("stage2_ab.coord_huber_delta", f"{PIPELINE}: coord_reg.config.coord_huber_delta"),
    ("stage2_ab.coord_entropy_weight", f"{PIPELINE}: coord_reg.config.coord_entropy_weight"),
    ("stage2_ab.coord_gate_weight", f"{PIPELINE}: coord_reg.config.coord_gate_weight"),
    ("stage2_ab.text_gate_weight", f"{PIPELINE}: coord_reg.config.text_gate_weight"),
    ("stage2_ab.channel_b.reordered_gt_sft", CHANNEL_B),
    (
        "stage2_ab.channel_b.desc_ce_weight_matched",
        "descriptions of matched objects are never trained; remove it",
    ),
    ("stage2_ab.channel_b.semantic_desc_gate", "use rollout_matching.desc_monitor (metrics only)"),
    ("stage2_ab.channel_b.mode", CHANNEL_B),
    ("stage2_ab.channel_b.async", "rollouts are made inside the optimizer step; remove it"),
    (
        "stage2_ab.channel_b.rollouts_per_step",
        "use training.effective_batch_size (raw samples of an optimizer step)",
    ),
    (
        "stage2_ab.channel_b.enable_pipeline",
        "rollouts are made inside the optimizer step; remove it",
    ),
    ("stage2_ab.channel_b.rollout_decode_batch_size", "use rollout_matching.decode_batch_size"),
    (
        "stage2_ab.channel_b.stop_neutral",
        "the closing brace and <|im_end|> are always supervised; remove it",
    ),
]


@pytest.mark.parametrize(("path", "instead"), REMOVED, ids=[path for path, _ in REMOVED])
def test_removed_keys_name_their_replacement(tmp_path: Path, path: str, instead: str) -> None:
    parts = path.split(".")
    text = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(parts[:-1]))
    text += f"{'  ' * (len(parts) - 1)}{parts[-1]}: 1\n"
    assert error_of(tmp_path, text) == f"{path} in run.yaml:{len(parts)}: removed; {instead}."


@pytest.mark.parametrize(
    ("old", "new"),
    [("stage2_ab_training", "stage2_two_channel"), ("rollout_matching_sft", "stage2_rollout_aligned")],
)
def test_removed_variants_name_their_successor(tmp_path: Path, old: str, new: str) -> None:
    in_section = error_of(tmp_path, f"custom:\n  trainer_variant: {old}\n")
    assert in_section == f'custom.trainer_variant = "{old}" in run.yaml:2: removed; use {new}.'
    flat = error_of(tmp_path, f"model: m\ncustom_trainer_variant: {old}\n")
    assert flat == f'custom_trainer_variant = "{old}" in run.yaml:2: removed; use {new}.'


WRONG = {
    "misspelt key of ours": (
        "custom:\n  coord_soft_ce_w1:\n    soft_ce_wieght: 1.0\n",
        "custom.coord_soft_ce_w1.soft_ce_wieght in run.yaml:3: unknown key; did you mean "
        f"custom.coord_soft_ce_w1.soft_ce_weight? {KNOWN_IN_COORD_LOSS}",
    ),
    "misspelt key with nothing near": (
        "custom:\n  coord_soft_ce_w1:\n    zzz: 1.0\n",
        f"custom.coord_soft_ce_w1.zzz in run.yaml:3: unknown key. {KNOWN_IN_COORD_LOSS}",
    ),
    "misspelt section": (
        "model:\n  model: m\ncustum:\n  head: auto\n",
        "custum in run.yaml:3: unknown section; did you mean custom?",
    ),
    "misspelt ms-swift argument in a section": (
        "training:\n  learning_rat: 1.0\n",
        "training.learning_rat in run.yaml:2: ms-swift has no such argument; did you mean learning_rate?",
    ),
    "misspelt ms-swift argument in the flat form": (
        "model: m\nlearning_rat: 1.0\n",
        "learning_rat in run.yaml:2: ms-swift has no such argument; did you mean learning_rate?",
    ),
    "argument of an older ms-swift": (
        "model: m\ntrain_type: lora\n",
        "train_type in run.yaml:2: ms-swift has no such argument; did you mean tuner_type?",
    ),
    "argument of the HF Trainer of old": (
        "training:\n  evaluation_strategy: steps\n",
        "training.evaluation_strategy in run.yaml:2: ms-swift has no such argument; did you mean eval_strategy?",
    ),
    "ms-swift argument outside its section": (
        "custom: {head: auto}\nmax_steps: 3\n",
        "max_steps in run.yaml:2: an ms-swift argument; in a file with sections it stands inside one: "
        "training.max_steps.",
    ),
    "our section at the top of the flat form": (
        "external_plugins: [coordexp/plugin.py]\ncustom: {head: auto}\n",
        "custom in run.yaml:2: external_plugins makes this ms-swift's flat form, where our sections stand under "
        "`coordexp:` and ms-swift's arguments at the top level; or leave out external_plugins.",
    ),
    "argument set twice": (
        "training:\n  max_length: 3\ntemplate:\n  max_length: 4\n",
        "template.max_length in run.yaml:4: already set as training.max_length (run.yaml:2); keep one of them.",
    ),
    "word that is not a choice": (
        "custom:\n  object_field_order: desc-first\n",
        'custom.object_field_order = "desc-first" in run.yaml:2: expected one of desc_first, geometry_first '
        '(did you mean "desc_first"?).',
    ),
    "choice of ms-swift": (
        "model: m\nsave_strategy: step\n",
        'save_strategy = "step" in run.yaml:2: expected one of no, steps, epoch, best (did you mean "steps"?).',
    ),
    "bare no": (
        "model: m\neval_strategy: no\n",
        "eval_strategy = false in run.yaml:2: expected text (YAML reads a bare no or off as false: write 'no').",
    ),
    "text for a number": (
        "custom:\n  coord_soft_ce_w1:\n    temperature: hot\n",
        'custom.coord_soft_ce_w1.temperature = "hot" in run.yaml:3: expected a valid number.',
    ),
    "number out of range": (
        "custom:\n  coord_soft_ce_w1:\n    temperature: 0\n",
        "custom.coord_soft_ce_w1.temperature = 0 in run.yaml:3: expected greater than 0.",
    ),
    "infinity": (
        "custom:\n  coord_soft_ce_w1:\n    temperature: .inf\n",
        "custom.coord_soft_ce_w1.temperature = Infinity in run.yaml:3: expected a finite number.",
    ),
    "text for a switch": (
        "custom:\n  coord_soft_ce_w1:\n    enabled: 'yes'\n",
        'custom.coord_soft_ce_w1.enabled = "yes" in run.yaml:3: expected a valid boolean.',
    ),
    "value where a mapping stands": (
        "custom:\n  coord_soft_ce_w1: true\n",
        "custom.coord_soft_ce_w1 = true in run.yaml:2: expected a mapping.",
    ),
    "unknown key inside a list": (
        "rollout_matching:\n  vllm:\n    mode: server\n    server:\n      servers:\n"
        "      - base_url: http://a\n        unknown_flag: 1\n",
        "rollout_matching.vllm.server.servers[0].unknown_flag in run.yaml:7: unknown key. Known here: base_url, "
        "group_port.",
    ),
    "missing key inside a list": (
        "rollout_matching:\n  vllm:\n    mode: server\n    server:\n      servers:\n      - group_port: 5\n",
        "rollout_matching.vllm.server.servers[0].base_url in run.yaml:6: is missing; it has no default.",
    ),
    "required key": (
        "stage2_ab:\n  schedule: {}\n  pipeline: {objective: []}\n",
        "2 problems:\n"
        "  stage2_ab.schedule.b_ratio in run.yaml:2: is missing; it has no default.\n"
        "  stage2_ab.pipeline.objective = [] in run.yaml:3: list should have at least 1 item after validation, "
        "not 0.",
    ),
    "beams on vllm": (
        "rollout_matching:\n  decode_mode: beam\n",
        "rollout_matching in run.yaml:1: decode_mode is beam, which only backend: hf has; use decode_mode: greedy.",
    ),
    "data in the flat form's sections": (
        "custom_trainer_variant: stage1\ncoordexp:\n  custom:\n    train_jsonl: a.jsonl\n",
        "custom.train_jsonl in run.yaml:4: has no effect here; write `dataset: [FILE]` at the top level, where "
        "ms-swift reads it.",
    ),
    "no variant in the flat form": (
        "model: m\nexternal_plugins: [coordexp/plugin.py]\n",
        "custom_trainer_variant in run.yaml:2: is missing; plain `swift sft` would train without CoordExp. Write "
        "stage1_coord, say.",
    ),
    "misspelt variant": (
        "model: m\ncustom_trainer_variant: stage1_cord\n",
        'custom_trainer_variant = "stage1_cord" in run.yaml:2: expected one of stage1_coord, stage2_two_channel, '
        "stage2_rollout_aligned, latent_prefix (did you mean stage1_coord?).",
    ),
    "two ways to name the data": (
        "custom:\n  train_jsonl: a.jsonl\ndata:\n  dataset: [b.jsonl]\n",
        "custom.train_jsonl in run.yaml:2: makes dataset ['a.jsonl'], but data.dataset is ['b.jsonl'] "
        "(run.yaml:4); keep one of them.",
    ),
    "batch that does not divide": (
        "training:\n  effective_batch_size: 10\n  per_device_train_batch_size: 4\n",
        "training.effective_batch_size = 10 in run.yaml:2: expected a multiple of per_device_train_batch_size * "
        "world size = 4 * 1 = 4, such as 8 or 12.",
    ),
    "repeated key": (
        "model: m\nmax_steps: 1\nmax_steps: 2\n",
        "run.yaml:3: key 'max_steps' is already set on line 2; keep one of them.",
    ),
    "key that is no text": ("model: m\nno: 1\n", "run.yaml:2: key 'no' is not text; put it in quotes."),
    "a rate for a table that is not there": (
        "custom:\n  coord_offset: {enabled: true, head_lr: 0.1}\n",
        "custom.coord_offset in run.yaml:2: head_lr cannot take effect with tie_head: true (one table, trained with "
        "embed_lr); set tie_head: false, or leave head_lr out.",
    ),
    "a list instead of settings": ("- a\n", "run.yaml:1: expected a mapping of settings, found list."),
    "missing base": ("extends: base.yaml\n", "extends in run.yaml:1: base.yaml does not exist."),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=list(WRONG))
def test_wrong_files_say_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(tmp_path, text) == expected


NOT_BUILT = {
    "custom:\n  coord_tokens: {skip_bbox_norm: false}\n": ("custom.coord_tokens.skip_bbox_norm = false", 2),
    "model: m\nsequence_parallel_size: 2\n": ("sequence_parallel_size = 2", 2),
}


@pytest.mark.parametrize(("text", "key", "line"), [(text, *rest) for text, rest in NOT_BUILT.items()])
def test_valid_keys_without_their_feature_are_refused(tmp_path: Path, text: str, key: str, line: int) -> None:
    message = error_of(tmp_path, text)
    assert message.startswith(f"{key} in run.yaml:{line}: a valid key, but ")
    assert message.endswith(" is not built yet in this version of coordexp.")


@pytest.mark.parametrize(
    "text",
    [
        "custom: {coord_offset: {enabled: true, embed_lr: 0.1, head_lr: 0.1}, head: fused}\n",
        "training: {packing: false}\n",
        "model: m\nsequence_parallel_size: 1\n",
        "custom: {trainer_variant: stage1}\n",
    ],
)
def test_values_that_ask_for_nothing_are_accepted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert load_run_config(file).variant == "stage1_coord"


OVERRIDES = {
    ("--set", "custom.object_ordering=shuffled"): (
        'custom.object_ordering = "shuffled" on the command line: expected one of sorted, random.'
    ),
    ("--set", "custom.hed=plain"): (
        "custom.hed on the command line: unknown key; did you mean custom.head? "
        f"Known here: {', '.join(Custom.model_fields)}."
    ),
    ("--set", "costom.head=plain"): (
        "costom.head on the command line: unknown section or argument; did you mean custom?"
    ),
    ("--set", "custom.head"): "--set custom.head: expected dotted.path=value, such as custom.head=plain.",
    (
        "--max_step",
        "3",
    ): "--max_step on the command line: ms-swift has no such argument; did you mean max_steps?",
    ("--max_steps", "three"): 'max_steps = "three" on the command line: expected an integer.',
    ("--max_steps",): "--max_steps on the command line: expected one value, found 0.",
    ("--max_steps", "3", "4"): "--max_steps on the command line: expected one value, found 2.",
    ("3",): "'3' on the command line: expected a flag such as --max_steps 100.",
    (
        "--custom.head",
        "plane",
    ): 'custom.head = "plane" on the command line: expected one of auto, plain, fused (did you '
    'mean "plain"?).',
    (
        "--custom.hed",
        "plain",
    ): "custom.hed on the command line: unknown key; did you mean custom.head? Known here: "
    + ", ".join(Custom.model_fields)
    + ".",
    (
        "--custom..head",
        "plain",
    ): "--custom..head: expected a dotted path, such as custom.coord_soft_ce_w1.enabled.",
    (
        "--custum.head",
        "plain",
    ): "custum.head on the command line: unknown section or argument; did you mean custom?",
    ("--custom_trainer_varient", "x"): (
        "--custom_trainer_varient on the command line: ms-swift has no such argument; did you mean "
        "custom_trainer_variant?"
    ),
    ("--coordexp", "{"): (
        "--coordexp is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char "
        "1)); expected an object of sections."
    ),
}


@pytest.mark.parametrize(("argv", "expected"), OVERRIDES.items(), ids=[" ".join(argv) for argv in OVERRIDES])
def test_wrong_overrides_say_what_to_do(tmp_path: Path, argv: tuple[str, ...], expected: str) -> None:
    assert error_of(tmp_path, "model: m\n", *argv) == expected


def test_every_problem_is_shown_at_once(tmp_path: Path) -> None:
    message = error_of(tmp_path, "model: m\nmax_step: 3\nbf16: maybe\ncoordexp:\n  custom:\n    hed: auto\n")
    lines = message.splitlines()
    assert lines[0] == "3 problems:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "max_step in run.yaml",
        'bf16 = "maybe" in run.yaml',
        "custom.hed in run.yaml",
    ]


def test_sections_that_arrive_as_json_name_their_source() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sections({"custom": {"coord_soft_ce_w1": {"target_sigma": -1}}}, source="--coordexp")
    assert str(caught.value) == (
        "custom.coord_soft_ce_w1.target_sigma = -1 in --coordexp: expected a number above 0, or "
        "points [[step, number], ...]."
    )


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"effective_batch_size": 8}}, "training.effective_batch_size"),
        ({"training": {"max_steps": 8}}, "training.max_steps"),
        ({"global_max_length": 100}, "global_max_length"),
        ({"custom": {"val_jsonl": "x"}}, "custom.val_jsonl"),
    ],
)
def test_keys_that_only_the_launcher_can_act_on_are_refused_in_the_plugin(sections: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} in --coordexp: has no effect here; write "):
        parse_sections(sections)
