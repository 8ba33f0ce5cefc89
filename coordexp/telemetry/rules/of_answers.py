"""Rules on what the model writes: rollouts of training and of evaluations; then evaluations alone. No torch."""

from __future__ import annotations

from coordexp.metrics import keys_rollout, keys_run, keys_stage2
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.telemetry.rules.rule import STAGE2, WatchRule, in_both, in_evaluations

OF_ROLLOUTS: tuple[WatchRule, ...] = (
    WatchRule(
        "truncated",
        in_both(keys_rollout.PARSE_TRUNCATED_RATE),
        "> 0.5",
        meaning="most rollouts are cut before they close",
        action="raise rollout_matching.max_new_tokens; if their texts repeat (look at a monitor dump), enable "
        "rollout_matching.repeat_terminate",
    ),
    WatchRule(
        "parse_drop",
        in_both(keys_rollout.PARSE_OBJ_DROP_FRAC),
        "> 0.2",
        meaning="many predicted objects break the format and are dropped",
        action="see stage2_ab/channel_b/strict_drop/reason/* for why; start from a longer stage-1 run, lower "
        "decoding.temperature, or raise token_ce's rollout_drop_invalid_struct_ce_multiplier",
        audited=True,
    ),
    WatchRule(
        "no_prediction",
        in_both(keys_rollout.SAMPLE_VALID_PRED_RATE),
        "< 0.5",
        meaning="most rollouts hold no valid object",
        action="check that the stage-1 checkpoint writes the format (coordexp infer), and that prompt and "
        "custom.object_field_order are those it was trained with",
        audited=True,
    ),
    WatchRule(
        "duplicates",
        in_both(keys_rollout.DUPLICATE_RATE_MEAN),
        "> 0.3",
        meaning="rollouts repeat objects that they have written before",
        action="look at a monitor dump; enable rollout_matching.repeat_terminate, lower decoding.temperature, or train "
        "stage 1 longer",
    ),
    WatchRule(
        "excluded",
        in_both(keys_rollout.EXCLUDED_RATE),
        "> 0",
        meaning="matched objects are left out of the targets",
        action="these rollouts have text before the container, or a prefix that cannot be continued: look at a monitor "
        "dump, and check the chat template",
        audited=True,
    ),
    WatchRule(
        "closure_drop",
        in_both(keys_stage2.CLOSURE_N_DROP),
        "> 0",
        meaning="samples are left out because the end of their target cannot be located",
        action="a monitor dump names the reason; check the tokenizer's normalizer and the descriptions of the records",
        audited=True,
    ),
    WatchRule(
        "gating",
        in_both(keys_rollout.GATING_REJECTION_RATE),
        f"> 0.9 and {keys_rollout.RECALL} < 0.5",
        meaning="nearly all candidate pairs overlap too little to match, and few objects are found",
        action="the boxes are far off: train stage 1 longer, check that image sizes agree, or lower "
        "rollout_matching.matching.maskiou_gate",
        audited=True,
    ),
    WatchRule(
        "slow_generation",
        (keys_rollout.GEN_TOKENS_PER_S,),
        "< 0.5 x best",
        meaning="generation has slowed down to under half of its best",
        action="see whether rollouts became longer (rollout/gen_new_tokens_p99); lower "
        "rollout_matching.decode_batch_size or raise vllm.gpu_memory_utilization if the engine runs out of cache; "
        "check for other jobs on the machine",
    ),
    WatchRule(
        "generation_waits",
        (keys_run.TIME_SHARES["generation"],),
        "> 0.8",
        meaning="training does little but wait for rollouts",
        action="let vLLM generate (rollout_matching.backend), lower max_new_tokens, or lower "
        "stage2_ab.schedule.b_ratio",
        for_steps=50,
        for_records=3,
        from_step=20,
        variants=STAGE2,
    ),
)

OF_EVALUATIONS: tuple[WatchRule, ...] = (
    WatchRule(
        "f1_fell",
        in_evaluations(keys_rollout.F1),
        "< best - 0.1",
        meaning="the model unlearns",
        action="lower the learning rate, or go back to the best checkpoint; look at precision and recall to see "
        "whether objects are missed or made up",
        audited=True,
    ),
    WatchRule(
        "map_fell",
        in_evaluations(keys_rollout.MAP),
        "< best - 0.05",
        meaning="boxes or their order have become worse than they were",
        action="compare eval_rollout/matched_maskiou_mean (boxes) and eval_rollout/f1 (objects); go back to the best "
        "checkpoint",
    ),
    WatchRule(
        "stalled",
        in_evaluations(keys_rollout.F1),
        "<= best",
        meaning="no evaluation has been better for a while",
        action="stop and keep the best checkpoint, or lower the learning rate",
        for_records=8,
    ),
    WatchRule(
        "overfit",
        (keys_run.EVAL_LOSS,),
        "> 1.1 x best",
        meaning="the loss on validation records rises while training goes on",
        action="keep the best checkpoint; train shorter, on more records, or with custom.augmentation",
        for_records=2,
    ),
    WatchRule(
        "empty_answers",
        in_evaluations(keys_rollout.PRECISION),
        f">= 1 and {EVAL_PREFIX}{keys_rollout.PRED_OBJECTS} == 0",
        meaning="the model writes no object at all; a precision of 1 is then a convention, not a success",
        action="look at samples/ for what it writes; train longer, and check that the prompt is that of training",
        audited=True,
    ),
    WatchRule(
        "coco_failed",
        in_evaluations(keys_rollout.COCO_EVAL_OK),
        "< 0.5",
        meaning="the COCO evaluation failed, so mAP is reported as 0",
        action="the log has the reason; do not choose a checkpoint by mAP until it is gone",
    ),
)
