"""Healthy ranges of the numbers that have one; a rule says what to do beyond them. No torch."""

from __future__ import annotations

from coordexp.metrics import keys_rollout, keys_run, keys_stage1, keys_stage2, keys_tokens
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.telemetry.rules.rule import HealthyRange

_STAGE2_DIAGNOSTICS = tuple(
    entry
    for provenance in keys_stage2.DIAGNOSTIC_PROVENANCES
    for entry in (
        HealthyRange(keys_stage2.coord_diagnostic(provenance, "expected_bin_mae"), high=50.0),
        HealthyRange(keys_stage2.coord_diagnostic(provenance, "coord_vocab_mass_mean"), low=0.95),
    )
)

RANGES: tuple[HealthyRange, ...] = (
    # every run
    HealthyRange(keys_run.GRAD_NORM, low=1e-6, high=20.0, from_step=100),
    HealthyRange(keys_run.TIME_SHARES["data"], high=0.1, from_step=20),
    HealthyRange(keys_run.PACKING_UTILIZATION, low=0.7),
    HealthyRange(keys_run.NONFINITE_METRICS_TOTAL, high=0.0),
    HealthyRange(keys_run.NONFINITE_LOSS_TOTAL, high=0.0),
    HealthyRange(keys_run.SAMPLES_REPLACED_TOTAL, high=0.0),
    HealthyRange(keys_run.TOKEN_TYPES_SKIPPED_TOTAL, high=0.0),
    HealthyRange(keys_run.OOM_RETRIES_TOTAL, high=0.0),
    # stage 1
    HealthyRange(keys_stage1.BASE_CE_LOSS, high=1.0, from_step=500),
    HealthyRange(keys_stage1.COORD_DIAG_EXPECTED_BIN_MAE, high=50.0, from_step=500),
    HealthyRange(keys_stage1.COORD_DIAG_COORD_VOCAB_MASS, low=0.95, from_step=200),
    HealthyRange(keys_tokens.TOKEN_ACC, low=0.6, from_step=500),
    HealthyRange(keys_tokens.TEXT_TOKEN_ACC, low=0.8, from_step=500),
    HealthyRange(keys_tokens.FLIP_COORD_TO_NONCOORD, high=0.02, from_step=200),
    HealthyRange(keys_tokens.FLIP_TEXT_TO_COORD, high=0.01, from_step=200),
    # what the model writes
    HealthyRange(keys_rollout.PARSE_TRUNCATED_RATE, high=0.1),
    HealthyRange(keys_rollout.PARSE_OBJ_DROP_FRAC, high=0.05),
    HealthyRange(keys_rollout.SAMPLE_VALID_PRED_RATE, low=0.9),
    HealthyRange(keys_rollout.DUPLICATE_RATE_MEAN, high=0.1),
    HealthyRange(keys_rollout.EXCLUDED_RATE, high=0.0),
    HealthyRange(keys_rollout.MATCHED_MASKIOU_MEAN, low=0.6),
    HealthyRange(keys_rollout.COCO_EVAL_OK, low=1.0),
    HealthyRange(keys_stage2.CLOSURE_N_DROP, high=0.0),
    HealthyRange(keys_stage2.CHANNEL_B_INVALID_ROLLOUT, high=0.0),
    *_STAGE2_DIAGNOSTICS,
)

_BY_KEY = {entry.key: entry for entry in RANGES}


def healthy_range(key: str) -> HealthyRange | None:
    """The range of a number, by its key in training or, with `eval_`, in an evaluation; None where it has none."""
    return _BY_KEY.get(key) or _BY_KEY.get(key.removeprefix(EVAL_PREFIX))


def is_healthy(key: str, value: float, step: int) -> bool | None:
    """Whether a value lies in the range of its number; None where there is none, or not yet at this step."""
    entry = healthy_range(key)
    return None if entry is None or step < entry.from_step else entry.holds(value)
