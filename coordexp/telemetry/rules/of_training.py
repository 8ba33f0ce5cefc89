"""Rules on records of training: every run, then stage 1. What the model writes stands in `of_answers.py`. No torch."""

from __future__ import annotations

from coordexp.metrics import keys_run, keys_stage1, keys_tokens
from coordexp.metrics.keys_stage2 import DIAGNOSTIC_PROVENANCES, coord_diagnostic
from coordexp.telemetry.rules.rule import STAGE1, WatchRule, in_both

EVERY_RUN: tuple[WatchRule, ...] = (
    WatchRule(
        "grad_norm_high",
        (keys_run.GRAD_NORM,),
        "> 3 x usual and > 2",
        meaning="gradients stay several times larger than they were",
        action="lower the learning rate, and see whether the loss rises too; what the steps trained on is in "
        "step_dumps/ with debug.step_dumps",
        for_steps=20,
        for_records=3,
        from_step=20,
    ),
    WatchRule(
        "terms_oppose",
        keys_run.GRADIENT_PAIRS,
        "< -0.5",
        meaning="two terms of the loss pull the hidden states against each other, and what one gains the other loses",
        action="compare gradient/norm/* of the two, and lower the weight of the one that evaluations need less",
        for_records=5,
    ),
    WatchRule(
        "grad_norm_zero",
        (keys_run.GRAD_NORM,),
        "== 0",
        meaning="no gradient reaches a weight that is trained",
        action="check tuner_type, target_modules and what is frozen; or every weight of the objective is 0",
        for_records=3,
    ),
    WatchRule(
        "learning_rate_zero",
        (keys_run.LEARNING_RATE,),
        "<= 0",
        meaning="the learning rate is 0, so nothing is learned any more",
        action="check learning_rate, lr_scheduler_type and max_steps; a resumed run may be past the end of its "
        "schedule",
        for_steps=10,
        for_records=3,
    ),
    WatchRule(
        "warmup_long",
        (keys_run.LR_PHASE,),
        "== 0",
        meaning="the learning rate is still warming up after a third of the run",
        action="lower warmup_ratio or warmup_steps, or train longer",
        for_records=2,
        from_share=0.33,
    ),
    WatchRule(
        "data_slow",
        (keys_run.TIME_SHARES["data"],),
        "> 0.2",
        meaning="steps wait for the data loader",
        action="raise dataloader_num_workers; see that the pictures lie on a fast disk",
        for_steps=50,
        for_records=3,
        from_step=20,
    ),
    WatchRule(
        "push_slow",
        (keys_run.TIME_SHARES["push"],),
        "> 0.3",
        meaning="steps wait while weights are pushed to the rollout engine",
        action="train less than all weights (LoRA, custom.coord_offset), or let a server of the same machine generate "
        "(runbooks/vllm_server.md)",
        for_steps=50,
        for_records=3,
        from_step=20,
    ),
    WatchRule(
        "packs_empty",
        (keys_run.PACKING_UTILIZATION,),
        f"< 0.7 and {keys_run.PACKING_MODE} == 1",
        meaning="packs are filled badly, so much of a step is padding",
        action="raise packing_length, or make it a multiple of the usual sample",
        for_steps=50,
        for_records=3,
    ),
    WatchRule(
        "memory_grows",
        (keys_run.MEMORY_PEAK,),
        "rises > 10% in 400",
        meaning="the most memory used so far keeps growing long after the start",
        action="look for ever longer samples (max_length, max_pixels), or for something that is kept from step to "
        "step; the run may be killed",
        from_step=600,
    ),
    WatchRule(
        "nonfinite_metric",
        in_both(keys_run.NONFINITE_METRICS_TOTAL),
        "> 0",
        meaning="numbers were NaN or infinite and left out of the log",
        action="the console names their keys; lower the learning rate, check max_grad_norm and the precision (fp16)",
    ),
    WatchRule(
        "nonfinite_loss",
        in_both(keys_run.NONFINITE_LOSS_TOTAL),
        "> 0",
        meaning="optimizer steps were skipped because the loss was not finite",
        action="lower the learning rate; look at the samples the console names",
    ),
    WatchRule(
        "oom_retries",
        in_both(keys_run.OOM_RETRIES_TOTAL),
        "> 0",
        meaning="memory ran out, and half the work was tried at once instead",
        action="the console says what it was; lower it, since the next time both halves may not fit",
    ),
)

OF_STAGE1: tuple[WatchRule, ...] = (
    WatchRule(
        "text_loss_flat",
        (keys_stage1.BASE_CE_LOSS,),
        "> 0.5 and falls < 1% in 200",
        meaning="the loss on text does not fall, although it is far from what a trained model has",
        action="raise the learning rate, and check that it is past its warm-up (lr/phase); look at a decoded sample "
        "(tools/inspect_sample.py) to see that prompt and answer are what you mean",
        from_step=100,
        variants=STAGE1,
        audited=True,
    ),
    WatchRule(
        "loss_rises",
        (keys_run.LOSS,),
        "rises > 5% in 200",
        meaning="the loss has been rising",
        action="lower the learning rate; go back to a checkpoint from before",
        from_step=100,
        variants=STAGE1,
    ),
    WatchRule(
        "bins_at_chance",
        (
            keys_stage1.COORD_DIAG_EXPECTED_BIN_MAE,
            *(coord_diagnostic(provenance, "expected_bin_mae") for provenance in DIAGNOSTIC_PROVENANCES),
        ),
        "> 150 and falls < 5% in 200",
        meaning="coordinates are as far off as guesses (250 bins for uniform guesses), and come no nearer",
        action="check that the rows of the coordinate tokens are trained (custom.coord_offset, or tuner_type: full), "
        "raise their learning rate, and compare boxes with pictures (tools/inspect_sample.py)",
        from_step=100,
        audited=True,
    ),
    WatchRule(
        "coord_mass_low",
        (
            keys_stage1.COORD_DIAG_COORD_VOCAB_MASS,
            *(coord_diagnostic(provenance, "coord_vocab_mass_mean") for provenance in DIAGNOSTIC_PROVENANCES),
        ),
        "< 0.9",
        meaning="probability leaks out of the coordinate vocabulary at coordinate slots, so answers will break there",
        action="set a gate_weight above 0, or ce_weight in stage 1; check that the coordinate rows are trained",
        for_steps=50,
        for_records=3,
        from_step=200,
    ),
    WatchRule(
        "flips_to_text",
        (keys_tokens.FLIP_COORD_TO_NONCOORD,),
        "> 0.05",
        meaning="the model prefers a text token at coordinate slots",
        action="set custom.coord_soft_ce_w1.gate_weight above 0, or train longer before rollouts begin",
        for_steps=50,
        for_records=3,
        from_step=200,
    ),
    WatchRule(
        "flips_to_coord",
        (keys_tokens.FLIP_TEXT_TO_COORD,),
        "> 0.02",
        meaning="the model prefers a coordinate token where text belongs",
        action="lower the weights of the coordinate loss against the text loss; in stage 2 set text_gate_weight",
        for_steps=50,
        for_records=3,
        from_step=200,
    ),
    WatchRule(
        "tokens_slower",
        (keys_run.TRAIN_TOKENS_PER_S,),
        "< 0.6 x usual",
        meaning="training has become slower than it was",
        action="look at time/share_* for the part that grew; check for other jobs on the machine, and its temperature",
        for_steps=50,
        for_records=3,
        from_step=20,
        variants=STAGE1,
    ),
    WatchRule(
        "samples_replaced",
        in_both(keys_run.SAMPLES_REPLACED_TOTAL),
        "> 0",
        meaning="samples that cannot be encoded were replaced by others, which are trained more often",
        action="set strict: true, and the first of them is named with its file and line",
        variants=STAGE1,
    ),
    WatchRule(
        "types_skipped",
        (keys_run.TOKEN_TYPES_SKIPPED_TOTAL,),
        "> 0",
        meaning="batches have no token types, so numbers split by type are of the others only",
        action="the console names the samples; their text is not what their record says",
        variants=STAGE1,
    ),
)
