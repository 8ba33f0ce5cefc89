"""The keys of the research code's run files: where each stands here, or why it is gone. Data alone.

`config migrate` rewrites files by it; `config check` names the right key by it where one of these is found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

FOREIGN = "a key of the research code"
Fate = Literal["kept", "moved", "dropped", "lost"]


@dataclass(frozen=True)
class Rule:
    """What becomes of the keys whose dotted path matches `pattern` as a whole.

    to: the key here (with groups of the pattern), for kept and moved ones.  why: for the others, and where the value
    changes.  unless: values of a lost key that ask for nothing, so that it is only dropped.
    """

    pattern: str
    fate: Fate
    to: str = ""
    why: str = ""
    unless: tuple[Any, ...] = ()


def _moved(pattern: str, to: str) -> Rule:
    return Rule(pattern, "moved", to)


def _dropped(pattern: str, why: str) -> Rule:
    return Rule(pattern, "dropped", why=why)


def _lost(pattern: str, why: str, *unless: Any) -> Rule:
    return Rule(pattern, "lost", why=why, unless=unless)


def _kept(pattern: str) -> Rule:
    return Rule(pattern, "kept")


_ENGINE_ARGS = (
    "block_size|cpu_offload_gb|disable_chunked_mm_input|disable_custom_all_reduce|enable_chunked_prefill|kv_cache_dtype|"
    "limit_mm_per_prompt|max_num_batched_tokens|mm_encoder_tp_mode|mm_processor_cache_gb|mm_processor_kwargs|"
    "skip_mm_profiling"
)
_COORDINATE_WEIGHTS = (
    "ce_weight|enabled|gate_weight|soft_ce_weight|target_sigma|target_truncate|temperature|w1_weight"
)

RULES: tuple[Rule, ...] = (
    # records and limits
    _kept(r"custom\.(train_jsonl|val_jsonl|object_field_order|object_ordering|prompt|trainer_variant)"),
    _moved(r"custom\.(train|val)_sample_limit", r"debug.\1_sample_limit"),
    _moved(r"custom\.user_prompt|prompts\.user(_prompt)?", "custom.prompt"),
    _moved(r"custom\.system_prompt|prompts\.system(_prompt)?", "template.system"),
    _moved(r"custom\.extra\.prompt_variant|custom\.prompt_variant|prompts\.variant", "custom.prompt"),
    _kept(r"rollout_matching\.(num_return_sequences|eval_prompt_variant)"),
    _moved(
        r"custom\.(extra\.)?eval_prompt_variant|prompts\.eval_variant", "rollout_matching.eval_prompt_variant"
    ),
    _lost(
        r"custom\.val_sample_with_replacement",
        "validation records are taken from the start of the file",
        False,
        None,
    ),
    _lost(
        r"custom\.emit_norm", "records hold bins already; nothing is normalised at load time", "none", None
    ),
    _lost(r"custom\.json_format", "custom.answer_format says how answers are written", "standard", None),
    _kept(r"custom\.coord_tokens\.(enabled|skip_bbox_norm)"),
    _kept(rf"custom\.coord_soft_ce_w1\.({_COORDINATE_WEIGHTS})"),
    _kept(r"custom\.coord_offset\.(enabled|tie_head|embed_lr|head_lr|weight_decay)"),
    _dropped(r"custom\.coord_offset\.ids(\..+)?", "the ids are those of the tokenizer's coordinate tokens"),
    _dropped(r"custom\.coord_offset\.dtype", "offsets have the type of the rows they are added to"),
    _kept(r"custom\.token_type_metrics\.(enabled|include|exclude|log_top5|coord_monitor_mass(_max_tokens)?)"),
    _dropped(
        r"custom\.dump_conversation_(path|text)", "`python tools/inspect_sample.py FILE:LINE` shows a sample"
    ),
    _dropped(
        r"custom\.extra\.instability_monitor(\..+)?",
        "a loss that is not finite stops the run (custom.on_nonfinite_loss), spikes are told by the health rules and "
        "`coordexp doctor`",
    ),
    _dropped(
        r"custom\.extra\.log_file(\..+)?",
        "write the console to a file: `coordexp train FILE | tee train.log`",
    ),
    _moved(r"custom\.extra\.rollout_matching\.(.+)", r"rollout_matching.\1"),
    _kept(r"custom\.augmentation\.(enabled|bypass_prob|ops|curriculum\.phases)"),
    _lost(
        r"custom\.augmentation_curriculum(\..+)?",
        "its phases are custom.augmentation.curriculum.phases",
        None,
    ),
    _lost(r"custom\.visual_kd(\..+)?", "there is no distillation here"),
    _lost(r"rlhf\..+", "there is no distillation here"),
    # stage 2
    _kept(r"stage2_ab\.schedule\.b_ratio"),
    _kept(
        r"stage2_ab\.(n_softctx_iter|softctx_grad_mode|softctx_temperature|coord_ctx_embed_mode|coord_decode_mode)"
    ),
    _kept(r"(stage2_ab|rollout_matching)\.pipeline\.(objective|diagnostics)"),
    _dropped(r"stage2_ab\.channel_b", "channel B has one contract and no settings"),
    _moved(r"rollout_matching\.rollout_backend", "rollout_matching.backend"),
    _moved(
        r"rollout_matching\.(candidate_top_k|maskiou_gate|maskiou_resolution|fp_cost|fn_cost|ot_cost|ot_epsilon|ot_iters)",
        r"rollout_matching.matching.\1",
    ),
    _moved(r"rollout_matching\.(temperature|top_p|top_k)", r"rollout_matching.decoding.\1"),
    _kept(r"rollout_matching\.decoding\.(temperature|top_p|top_k)"),
    _kept(
        r"rollout_matching\.(decode_batch_size|decode_mode|num_beams|max_new_tokens|repetition_penalty|coord_decode_mode"
        r"|packing_length)"
    ),
    _kept(r"rollout_matching\.repeat_terminate\.\w+"),
    _kept(r"rollout_matching\.offload\.(enabled|offload_model|offload_optimizer)"),
    _kept(
        r"rollout_matching\.monitor_dump\.(enabled|every_steps|max_events|max_samples|max_text_chars|min_free_gb|out_dir)"
    ),
    _dropped(r"rollout_matching\.monitor_dump\.write_markdown", "a dump always has its Markdown page"),
    _kept(
        r"rollout_matching\.desc_monitor\.(enabled|every_steps|max_pairs|mode|semantic_model|semantic_threshold"
        r"|semantic_device)"
    ),
    _moved(
        r"rollout_matching\.desc_monitor\.semantic_(batch_size|max_length)",
        r"rollout_matching.desc_monitor.\1",
    ),
    _kept(r"rollout_matching\.eval_detection\.(enabled|score_mode|metrics)"),
    _moved(r"rollout_matching\.eval_detection\.use_segm", "rollout_matching.eval_detection.iou_type"),
    _dropped(
        r"rollout_matching\.eval_detection\.constant_score", "equal scores rank alike whatever their value"
    ),
    _dropped(
        r"rollout_matching\.eval_detection\.pred_score_(source|version)",
        "what made a score is written beside it",
    ),
    _dropped(
        r"rollout_matching\.eval_detection\.strict_parse",
        "answers are never repaired, broken objects dropped",
    ),
    _kept(
        r"rollout_matching\.vllm\.(mode|gpu_memory_utilization|tensor_parallel_size|max_model_len|max_num_seqs"
        r"|enforce_eager|enable_prefix_caching|sleep_level)"
    ),
    _moved(
        rf"rollout_matching\.vllm\.({_ENGINE_ARGS})((?:\..+)?)", r"rollout_matching.vllm.engine_args.\1\2"
    ),
    _dropped(
        r"rollout_matching\.vllm\.(enable_lora|max_lora_rank)", "merged weights are pushed; nothing to set"
    ),
    _dropped(
        r"rollout_matching\.vllm\.infer_batch_size",
        "rollout_matching.decode_batch_size is the only chunking knob",
    ),
    _kept(r"rollout_matching\.vllm\.server\.(servers|timeout_s|infer_timeout_s)"),
    _dropped(
        r"rollout_matching\.vllm\.server\.debug_dump(\..+)?", "rollout_matching.monitor_dump shows rollouts"
    ),
    _dropped(
        r"rollout_matching\.vllm\.sync(\..+)?", "weights are always pushed whole, adapters merged into them"
    ),
    # sections that are the same, and the run itself
    _kept(r"debug\.(enabled|output_dir|train_sample_limit|val_sample_limit)"),
    _kept(r"deepspeed\.(enabled|config)"),
    _kept(r"experiment\.(title|purpose|hypothesis|notes|tags)"),
    _kept(r"global_max_length"),
    # ms-swift's arguments that are not what they were
    _moved(r"tuner\.(train_type|sft_type)", "tuner.tuner_type"),
    _dropped(r"data\.(val_)?dataset", "the records are custom.train_jsonl and custom.val_jsonl"),
    _dropped(r"training\.packing_mode", "packs are made once from the lengths of all samples"),
    _dropped(
        r"training\.packing_length_precompute_workers", "data.dataset_num_proc measures samples in parallel"
    ),
    _dropped(
        r"training\.packing_(buffer|min_fill_ratio|drop_last)",
        "no packer here carries samples from step to step, and none is dropped",
    ),
    _dropped(r"training\.save_safetensors", "checkpoints are always safetensors"),
    _dropped(r"training\.greater_is_better", "the direction of a number stands in the catalogue of metrics"),
    _kept(r"training\.(effective_batch_size|packing|eval_packing|save_delay_steps|save_last_epoch)"),
)
"""The first rule that matches holds. ms-swift's arguments that are the same there and here have none."""


def rule_of(path: str) -> Rule | None:
    """The rule of a dotted path, with `to` spelled out; None for a path that the research code does not have."""
    for rule in RULES:
        match = re.fullmatch(rule.pattern, path)
        if match:
            to = match.expand(rule.to) if rule.to else path if rule.fate == "kept" else ""
            return Rule(rule.pattern, rule.fate, to, rule.why, rule.unless)
    return None


def advice(path: str) -> str | None:
    """What to say where `path` is written in a file of ours; None where it is no key of the research code's alone."""
    rule = rule_of(path)
    if rule is None or rule.fate == "kept":
        return None
    said = f"now {rule.to}" if rule.fate == "moved" else rule.why
    return f"{FOREIGN}; {said}."
