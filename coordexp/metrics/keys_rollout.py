"""Metric keys of rollouts: generation, parsing, matching, descriptions, lengths, packing and timing."""

from __future__ import annotations

from coordexp.metrics.spec import Better, KeySection, Kind, Reduce

WITH_ROLLOUT = "steps with a rollout"
EVAL_ONLY = "rollout evaluation only (as `eval_rollout/...`)"
DESC_ON = "with `rollout_matching.desc_monitor.enabled: true`"

TIME = KeySection(
    "Rollout timing (`time/*`)", "Wall-clock seconds; absent, not 0, on steps without a rollout."
)
TIME_ROLLOUT_GENERATE = TIME.define(
    "time/rollout_generate_s", Kind.SECONDS, "Generating the rollouts of a step.", unit="s", when=WITH_ROLLOUT
)
TIME_ROLLOUT_PARSE_MATCH = TIME.define(
    "time/rollout_parse_match_s", Kind.SECONDS, "Parsing and matching them.", unit="s", when=WITH_ROLLOUT
)
TIME_ROLLOUT_TEACHER_ENCODE = TIME.define(
    "time/rollout_teacher_encode_s",
    Kind.SECONDS,
    "Building and encoding the training targets.",
    unit="s",
    when=WITH_ROLLOUT,
)
TIME_ROLLOUT_EVAL = TIME.define(
    "time/rollout_eval_s",
    Kind.SECONDS,
    "Asking the model and judging its answers, a part of `eval_runtime`.",
    unit="s",
    when="evaluation of stage 1 with `custom.rollout_eval` (as `eval_time/...`)",
)

ROLLOUT = KeySection(
    "Rollouts (`rollout/*`)",
    "Numbers of the model's own answers. Absent, not 0, on steps without a rollout. Evaluation reports "
    "them over the "
    "whole evaluation set, summed over ranks, with the prefix `eval_`.",
)


def _rollout(
    name: str,
    kind: Kind,
    meaning: str,
    unit: str = "1",
    *,
    when: str = WITH_ROLLOUT,
    over: str = "micro-steps",
    reduce: Reduce | None = None,
    pattern: str = "",
    better: Better | None = None,
) -> str:
    return ROLLOUT.define(
        f"rollout/{name}",
        kind,
        meaning,
        unit=unit,
        when=when,
        over=over,
        reduce=reduce,
        pattern=pattern,
        better=better,
    )


# generation
GEN_NEW_TOKENS_TOTAL = _rollout(
    "gen_new_tokens_total", Kind.COUNTER, "Generated tokens after suffix trimming.", "tokens"
)
GEN_NEW_TOKENS_MEAN = _rollout(
    "gen_new_tokens_mean", Kind.GAUGE, "Generated tokens of a rollout.", "tokens", over="rollouts"
)
GEN_NEW_TOKENS_P90 = _rollout(
    "gen_new_tokens_p90", Kind.PERCENTILE, "90th percentile of generated tokens.", "tokens"
)
GEN_NEW_TOKENS_P99 = _rollout(
    "gen_new_tokens_p99",
    Kind.PERCENTILE,
    "99th percentile of generated tokens; equal to max_new_tokens when rollouts run into the limit.",
    "tokens",
    reduce=Reduce.MAX,
)
GEN_TOKENS_PER_S = _rollout(
    "gen_tokens_per_s",
    Kind.RATE,
    "Generated tokens over seconds of generation, both summed over steps and ranks: the throughput of one "
    "rank.",
    "tokens/s",
    over="seconds of `time/rollout_generate_s`",
    better="higher",
)
DO_SAMPLE = _rollout("do_sample", Kind.FLAG, "1 when rollouts are sampled, 0 when they are deterministic.")
TEMPERATURE = _rollout("temperature", Kind.GAUGE, "Effective sampling temperature.")
TOP_P = _rollout("top_p", Kind.GAUGE, "Effective nucleus mass.", "probability")
TOP_K = _rollout("top_k", Kind.GAUGE, "Effective top-k cut.", "tokens")
DECODE_NON_BEAM_COUNT = _rollout(
    "decode_non_beam_count",
    Kind.COUNTER,
    "Samples rolled out without beam search (sampled ones included).",
    "samples",
)
DECODE_BEAM_COUNT = _rollout(
    "decode_beam_count", Kind.COUNTER, "Samples rolled out with beam search.", "samples"
)
REPEAT_TERMINATE_ACTIVE = _rollout(
    "repeat_terminate_active", Kind.FLAG, "1 when repeat-aware termination is on."
)
REPEAT_TERMINATE_TRIGGERED = _rollout(
    "repeat_terminate_triggered_sequences",
    Kind.COUNTER,
    "Rollouts that repeat-aware termination ended.",
    "rollouts",
    better="lower",
)

# parsing
PARSE_DROPPED_INVALID = _rollout(
    "parse_dropped_invalid", Kind.COUNTER, "Predicted objects dropped as invalid.", "objects", better="lower"
)
PARSE_DROPPED_AMBIGUOUS = _rollout(
    "parse_dropped_ambiguous",
    Kind.COUNTER,
    "Predicted objects dropped as ambiguous.",
    "objects",
    better="lower",
)
PARSE_TRUNCATED = _rollout(
    "parse_truncated",
    Kind.COUNTER,
    "Rollouts cut inside an object or before the container closed.",
    "rollouts",
    better="lower",
)
PARSE_TRUNCATED_RATE = _rollout(
    "parse_truncated_rate",
    Kind.RATE,
    "Share of rollouts that were truncated.",
    "fraction",
    over="rollouts",
    better="lower",
)
PARSE_OBJ_TOTAL = _rollout(
    "parse_obj_total", Kind.COUNTER, "Objects started: valid + invalid + ambiguous.", "objects"
)
PARSE_OBJ_VALID_FRAC = _rollout(
    "parse_obj_valid_frac",
    Kind.RATE,
    "Share of started objects that are valid.",
    "fraction",
    over="`rollout/parse_obj_total`",
    better="higher",
)
PARSE_OBJ_DROP_FRAC = _rollout(
    "parse_obj_drop_frac",
    Kind.RATE,
    "Share of started objects that were dropped.",
    "fraction",
    over="`rollout/parse_obj_total`",
    better="lower",
)
DUPLICATE_RATE_MEAN = _rollout(
    "duplicate_rate_mean",
    Kind.GAUGE,
    "Share of a rollout's valid objects that repeat an earlier one (same description, IoU of the boxes above 0.9); 0 "
    "without objects.",
    "fraction",
    over="rollouts",
    better="lower",
)
DUPLICATE_RATE_P99 = _rollout(
    "duplicate_rate_p99",
    Kind.PERCENTILE,
    "99th percentile of that share; near 1 when some rollouts do nothing but repeat themselves.",
    "fraction",
    reduce=Reduce.MAX,
    better="lower",
)
SAMPLE_VALID_PRED_RATE = _rollout(
    "sample_valid_pred_rate",
    Kind.RATE,
    "Share of samples with at least one valid object.",
    "fraction",
    over="samples",
    better="higher",
)
SAMPLE_ANY_MATCH_RATE = _rollout(
    "sample_any_match_rate",
    Kind.RATE,
    "Share of samples with at least one supervised match.",
    "fraction",
    over="samples",
    better="higher",
)

# matching
GT_OBJECTS_TOTAL = _rollout("gt_objects_total", Kind.COUNTER, "Ground-truth objects.", "objects")
VALID_PRED_OBJECTS_TOTAL = _rollout(
    "valid_pred_objects_total", Kind.COUNTER, "Valid predicted objects.", "objects"
)
MATCHED_FOR_SUPERVISION = _rollout(
    "matched_for_supervision", Kind.COUNTER, "Matched objects used as targets.", "objects", better="higher"
)
EXCLUDED_FROM_SUPERVISION = _rollout(
    "excluded_from_supervision",
    Kind.COUNTER,
    "Matched objects left out because no target could be built.",
    "objects",
    better="lower",
)
EXCLUDED_RATE = _rollout(
    "excluded_rate",
    Kind.RATE,
    "`excluded_from_supervision / (matched_for_supervision + excluded_from_supervision)`.",
    "fraction",
    over="matched objects",
    better="lower",
)
FN_APPENDED_TOTAL = _rollout(
    "fn_appended_total", Kind.COUNTER, "Missed objects appended to the target.", "objects", better="lower"
)
ORACLE_RECALL = _rollout(
    "oracle_recall",
    Kind.RATE,
    "Share of ground-truth objects that at least one of the `num_return_sequences` answers to their question found; "
    "beside `rollout/recall`, the mean over these answers, it says how much better sampling knows than it answers.",
    "fraction",
    when="steps with a rollout, with `num_return_sequences` above 1",
    over="ground-truth objects",
    better="higher",
)
PREFIX_EDITS = {
    name: _rollout(
        f"prefix_{name}",
        Kind.COUNTER,
        meaning,
        "objects",
        better="lower",
        when=f"steps with a rollout, with {setting}",
    )
    for name, meaning, setting in (
        (
            "duplicates_dropped",
            "Second copies of an object that left the answer before it was taught.",
            "`targets.drop_duplicates_above_iou`",
        ),
        (
            "replaced",
            "Predictions without a partner that a missed object replaced where they stood.",
            "`targets.replace_above_iou`",
        ),
        (
            "unmatched_dropped",
            "Other predictions without a partner that left the answer before it was taught.",
            "`targets.drop_unmatched`",
        ),
        (
            "missed_written",
            "Missed objects that were written among those of the answer, not behind them; part of `fn_appended_total`.",
            "`targets.missed: in_order` or `targets.replace_above_iou`",
        ),
    )
}
"""Keys by the name of what was changed."""
FN_TOTAL = _rollout(
    "fn_total", Kind.COUNTER, "Ground-truth objects without a supervised match.", "objects", better="lower"
)
GATING_REJECTIONS = _rollout(
    "gating_rejections", Kind.COUNTER, "Candidate pairs under `maskiou_gate`.", "pairs", better="lower"
)
GATING_REJECTION_RATE = _rollout(
    "gating_rejection_rate",
    Kind.RATE,
    "Share of candidate pairs under the gate.",
    "fraction",
    over="candidate pairs",
    better="lower",
)
PRECISION = _rollout(
    "precision",
    Kind.RATE,
    "Matched over predicted objects.",
    "fraction",
    over="valid predicted objects",
    better="higher",
)
RECALL = _rollout(
    "recall",
    Kind.RATE,
    "Matched over ground-truth objects.",
    "fraction",
    over="ground-truth objects",
    better="higher",
)
F1 = _rollout(
    "f1",
    Kind.RATE,
    "2 matched / (predicted + ground truth). The usual `metric_for_best_model`.",
    "fraction",
    over="predicted plus ground-truth objects",
    better="higher",
)
MATCHED_MASKIOU_MEAN = _rollout(
    "matched_maskiou_mean",
    Kind.GAUGE,
    "Mean maskIoU of matched pairs, in norm1000 space.",
    "IoU",
    over="matched pairs",
    better="higher",
)
MATCHED_MASKIOU_COUNT = _rollout(
    "matched_maskiou_count", Kind.COUNTER, "Pairs in `matched_maskiou_mean`.", "pairs"
)
PREFIX_COORD_TARGETS_TOTAL = _rollout(
    "prefix_coord_targets_total", Kind.COUNTER, "Coordinate slots supervised inside the prefix.", "tokens"
)
PREFIX_COORD_TARGETS_PER_MATCHED = _rollout(
    "prefix_coord_targets_per_matched",
    Kind.GAUGE,
    "Such slots of one matched object.",
    "tokens/object",
    over="matched objects",
)
TAIL_IGNORE_FRAC = _rollout(
    "tail_ignore_frac",
    Kind.RATE,
    "Share of appended-tail tokens left out of the cross-entropy because they are masked description tokens.",
    "fraction",
    over="appended-tail tokens",
)

# evaluation counts
PRED_OBJECTS = _rollout("pred_objects", Kind.COUNTER, "Valid predicted objects.", "objects", when=EVAL_ONLY)
GT_OBJECTS = _rollout("gt_objects", Kind.COUNTER, "Ground-truth objects.", "objects", when=EVAL_ONLY)
MATCHED = _rollout("matched", Kind.COUNTER, "Matched objects.", "objects", when=EVAL_ONLY, better="higher")
FALSE_POSITIVES = _rollout(
    "fp", Kind.COUNTER, "Predicted objects without a match.", "objects", when=EVAL_ONLY, better="lower"
)
FALSE_NEGATIVES = _rollout(
    "fn", Kind.COUNTER, "Ground-truth objects without a match.", "objects", when=EVAL_ONLY, better="lower"
)
MAP = _rollout(
    "mAP",
    Kind.GAUGE,
    "COCO AP (IoU 0.5:0.95) of the rollouts; the only COCO number reported while training.",
    "AP",
    when=EVAL_ONLY + ", with `rollout_matching.eval_detection.enabled: true` and `metrics: coco` or `both`",
    over="evaluations",
    better="higher",
)
F1_50_95 = _rollout(
    "f1_50_95",
    Kind.GAUGE,
    "F1 of predictions and ground truth with the same description, mean over IoU 0.5:0.95; needs no scores.",
    "fraction",
    when=EVAL_ONLY + ", with `rollout_matching.eval_detection.metrics: f1` or `both`",
    over="evaluations",
    better="higher",
)
COCO_EVAL_OK = _rollout(
    "coco_eval_ok",
    Kind.FLAG,
    "1 when the COCO evaluation succeeded, 0 when it failed: mAP is then 0 and F1 absent.",
    when=EVAL_ONLY + ", with `rollout_matching.eval_detection.enabled: true`",
)

# descriptions on geometry-matched pairs
DESC_PAIRS_TOTAL = _rollout(
    "desc_pairs_total", Kind.COUNTER, "Matched pairs whose descriptions were compared.", "pairs", when=DESC_ON
)
DESC_EXACT_ACC_ON_MATCHED = _rollout(
    "desc_exact_acc_on_matched",
    Kind.GAUGE,
    "Share of matched pairs with equal normalised descriptions.",
    "fraction",
    when=DESC_ON,
    over="matched pairs",
    better="higher",
)
DESC_SEM_ENABLED = _rollout(
    "desc_sem_enabled", Kind.FLAG, "1 when the sentence-embedding model is available.", when=DESC_ON
)
DESC_SEM_ACC_ON_MATCHED = _rollout(
    "desc_sem_acc_on_matched",
    Kind.GAUGE,
    "Share of matched pairs with equal descriptions or a cosine similarity over the threshold.",
    "fraction",
    when=DESC_ON,
    over="matched pairs",
    better="higher",
)
DESC_SEM_SIM_MEAN = _rollout(
    "desc_sem_sim_mean",
    Kind.GAUGE,
    "Mean cosine similarity of descriptions.",
    "cosine",
    when=DESC_ON,
    over="embedded pairs",
    better="higher",
)
DESC_SEM_SIM_COUNT = _rollout(
    "desc_sem_sim_count", Kind.COUNTER, "Pairs in `desc_sem_sim_mean`.", "pairs", when=DESC_ON
)

EVALUATION = (
    PRECISION,
    RECALL,
    F1,
    PRED_OBJECTS,
    GT_OBJECTS,
    MATCHED,
    FALSE_POSITIVES,
    FALSE_NEGATIVES,
    PARSE_TRUNCATED_RATE,
    PARSE_DROPPED_INVALID,
    PARSE_DROPPED_AMBIGUOUS,
    DUPLICATE_RATE_MEAN,
    DUPLICATE_RATE_P99,
    SAMPLE_VALID_PRED_RATE,
    SAMPLE_ANY_MATCH_RATE,
    MATCHED_MASKIOU_MEAN,
)
"""What evaluation by rollouts reports."""
EVALUATION_DETECTION = {
    "coco": (MAP, COCO_EVAL_OK),
    "f1": (F1_50_95, COCO_EVAL_OK),
    "both": (MAP, F1_50_95, COCO_EVAL_OK),
}
"""Also with `rollout_matching.eval_detection.enabled: true`, by its `metrics`."""
EVALUATION_DESC = (
    DESC_PAIRS_TOTAL,
    DESC_EXACT_ACC_ON_MATCHED,
    DESC_SEM_ENABLED,
    DESC_SEM_ACC_ON_MATCHED,
    DESC_SEM_SIM_MEAN,
    DESC_SEM_SIM_COUNT,
)
"""Also with `rollout_matching.desc_monitor.enabled: true`."""


# lengths
def _length(part: str, meaning: str) -> tuple[str, str]:
    mean = _rollout(
        f"{part}_len_mean",
        Kind.GAUGE,
        f"Mean length of {meaning}.",
        "tokens",
        over="samples",
        pattern="rollout/<part>_len_mean",
    )
    p90 = _rollout(
        f"{part}_len_p90",
        Kind.PERCENTILE,
        f"90th percentile of the length of {meaning}.",
        "tokens",
        pattern="rollout/<part>_len_p90",
    )
    return mean, p90


PROMPT_LEN_MEAN, PROMPT_LEN_P90 = _length("prompt", "the prompt")
ROLLOUT_LEN_MEAN, ROLLOUT_LEN_P90 = _length("rollout", "the rollout")
TRAIN_LEN_MEAN, TRAIN_LEN_P90 = _length("train", "the training target")
APPEND_LEN_MEAN, APPEND_LEN_P90 = _length("append", "the appended tail")
ENCODED_LEN_MEAN, ENCODED_LEN_P90 = _length("encoded", "the whole encoded sample")

PACKING = KeySection("Post-rollout packing (`packing/*`)")
PACKING_FILL = PACKING.define(
    "packing/post_rollout_fill",
    Kind.GAUGE,
    "Used share of `packing_length`.",
    unit="fraction",
    when=WITH_ROLLOUT + " and packing",
    over="packs",
    better="higher",
)
PACKING_SEGMENTS = PACKING.define(
    "packing/post_rollout_segments",
    Kind.GAUGE,
    "Segments in one pack.",
    unit="segments",
    when=WITH_ROLLOUT + " and packing",
    over="packs",
)
PACKING_BUFFER = PACKING.define(
    "packing/post_rollout_buffer",
    Kind.GAUGE,
    "Segments waiting for a later pack.",
    unit="segments",
    when=WITH_ROLLOUT + " and packing",
    over="packs",
)

SECTIONS = (TIME, ROLLOUT, PACKING)
