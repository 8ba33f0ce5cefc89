"""What the rollouts of a step say about the model, as entries for `MetricStore.add_all`.

    outcomes = [RolloutOutcome(rollout, parsed, match, num_gt, sample), ...]
    store.add_all(rollout_metrics(outcomes, settings.rollout_matching, generate_s=..., ...))
    store.add_all(channel_b_metrics(outcomes))
    store.add_all(packing_metrics(pack_lengths, capacity, num_segments=...))

Counters are sums; rates and means are (numerator, denominator) pairs, so that a step cut into any micro-batches and
ranks gives the same numbers. Percentiles are taken over the outcomes of one call: call once per rank and step.
Without outcomes nothing is returned: on steps without a rollout the keys are absent, not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coordexp.codec.parse import ParsedRollout
from coordexp.codec.schema import NUM_BINS
from coordexp.codec.token_types import TokenType
from coordexp.config.schema.rollout import RolloutMatching, RolloutTargets
from coordexp.eval.detection import Counts
from coordexp.eval.oracle import found_by_any
from coordexp.eval.predictions.image_result import duplicate_rate, objects_of
from coordexp.matching import MatchResult
from coordexp.metrics import keys_rollout as keys
from coordexp.metrics.keys_datasets import ROLLOUTS_BY_DATASET, dataset_key
from coordexp.metrics.keys_stage2 import (
    CHANNEL_B_INVALID_ROLLOUT,
    CLOSURE_N_DROP,
    STAGE2_RAW_ROLLOUTS,
    STRICT_DROP_N_DROP_INVALID,
    STRICT_DROP_N_VALID_PRED,
    strict_drop_reason,
)
from coordexp.rollout.types import Rollout
from coordexp.targets import DroppedSample, EncodedSample, TokenRole
from coordexp.targets.counts import count_supervision

_TAIL_ROLES = (TokenRole.FN_TAIL, TokenRole.CLOSURE, TokenRole.EOS)

MetricEntries = dict[str, float | tuple[float, float]]
"""Key -> a number, or the (sum, count) of a mean or rate."""


@dataclass(frozen=True)
class RolloutOutcome:
    """What became of one rollout.

    match: of `parsed.objects` with the record's `num_gt` objects.
    sample: the training target made of it, or why there is none.
    """

    rollout: Rollout
    parsed: ParsedRollout
    match: MatchResult
    num_gt: int
    sample: EncodedSample | DroppedSample

    @property
    def num_supervised(self) -> int:
        """Matched predictions that the target supervises: none when the prefix could not be continued."""
        return self.sample.num_matched if isinstance(self.sample, EncodedSample) else 0


def rollout_metrics(
    outcomes: Sequence[RolloutOutcome],
    decoding: RolloutMatching,
    *,
    generate_s: float,
    parse_match_s: float,
    encode_s: float,
    fn_desc_weight: float = 1.0,
) -> MetricEntries:
    """Every `rollout/*` and `time/rollout_*` key of training, but for the description monitor's.

    decoding: the settings the rollouts were generated with.
    generate_s, parse_match_s, encode_s: seconds this rank spent on these outcomes.
    fn_desc_weight: cross-entropy weight of descriptions of missed objects (token_ce's weight times its
    `rollout_fn_desc_weight`); 0 masks them, which is what `rollout/tail_ignore_frac` shows.
    """
    if not outcomes:
        return {}
    return {
        keys.TIME_ROLLOUT_GENERATE: generate_s,
        keys.TIME_ROLLOUT_PARSE_MATCH: parse_match_s,
        keys.TIME_ROLLOUT_TEACHER_ENCODE: encode_s,
        **_generation(outcomes, generate_s),
        **_decoding(len(outcomes), decoding),
        **_parsing(outcomes),
        **_duplicates(outcomes),
        **_matching(outcomes),
        **_construction(outcomes, fn_desc_weight),
        **_edits(outcomes, decoding.targets),
        **_oracle(outcomes, decoding.num_return_sequences),
        **_lengths(outcomes),
    }


def part_metrics(outcomes: Sequence[RolloutOutcome], parts: Sequence[str]) -> MetricEntries:
    """`dataset/<name>/rollout/*` of the data sets of a mixture.

    parts: the data set of each outcome; an empty name is none.
    """
    entries: MetricEntries = {}
    for name in sorted(set(parts) - {""}):
        own = [outcome for outcome, part in zip(outcomes, parts, strict=True) if part == name]
        matching = _matching(own)
        entries |= {dataset_key(name, key): matching[key] for key in ROLLOUTS_BY_DATASET}
    return entries


def channel_b_metrics(outcomes: Sequence[RolloutOutcome]) -> MetricEntries:
    """`stage2/raw_rollouts` and the `stage2_ab/channel_b/*` counters.

    `N_drop_invalid` does not hold the ambiguous ones: it is the sum of all reasons but `ambiguous`. Reasons that did
    not occur are absent. `invalid_rollout` counts samples whose target starts from the empty container.
    """
    if not outcomes:
        return {}
    parsed = [outcome.parsed for outcome in outcomes]
    metrics: MetricEntries = {
        STAGE2_RAW_ROLLOUTS: float(len(outcomes)),
        STRICT_DROP_N_VALID_PRED: _total(len(one.objects) for one in parsed),
        STRICT_DROP_N_DROP_INVALID: _total(one.dropped_invalid for one in parsed),
        CLOSURE_N_DROP: _total(isinstance(outcome.sample, DroppedSample) for outcome in outcomes),
        CHANNEL_B_INVALID_ROLLOUT: _total(one.prefix_is_fallback for one in parsed),
    }
    for reason in sorted({reason for one in parsed for reason in one.dropped_by_reason}):
        metrics[strict_drop_reason(reason)] = _total(one.dropped_by_reason.get(reason, 0) for one in parsed)
    return metrics


def packing_metrics(
    pack_lengths: Sequence[int], capacity: int, num_segments: int, buffer: int = 0
) -> MetricEntries:
    """`packing/post_rollout_*` of the packs a rank made; nothing without packs.

    pack_lengths: tokens in each pack.  capacity: `packing_length`.  num_segments: samples in all packs together.
    buffer: samples left for a later pack.
    """
    num_packs = len(pack_lengths)
    if not num_packs:
        return {}
    return {
        keys.PACKING_FILL: (float(sum(pack_lengths)), float(capacity * num_packs)),
        keys.PACKING_SEGMENTS: (float(num_segments), float(num_packs)),
        keys.PACKING_BUFFER: (float(buffer * num_packs), float(num_packs)),
    }


def _generation(outcomes: Sequence[RolloutOutcome], generate_s: float) -> MetricEntries:
    new_tokens = [len(outcome.parsed.response_token_ids) for outcome in outcomes]
    total = float(sum(new_tokens))
    return {
        keys.GEN_NEW_TOKENS_TOTAL: total,
        keys.GEN_NEW_TOKENS_MEAN: (total, float(len(outcomes))),
        keys.GEN_NEW_TOKENS_P90: _percentile(new_tokens, 90),
        keys.GEN_NEW_TOKENS_P99: _percentile(new_tokens, 99),
        keys.GEN_TOKENS_PER_S: (total, generate_s),
        keys.REPEAT_TERMINATE_TRIGGERED: _total(outcome.rollout.repeat_terminated for outcome in outcomes),
    }


def _decoding(num_rollouts: int, decoding: RolloutMatching) -> MetricEntries:
    beam = decoding.decode_mode == "beam"
    knobs = decoding.decoding
    return {
        keys.DO_SAMPLE: float(not beam and knobs.temperature > 0),
        keys.TEMPERATURE: (knobs.temperature * num_rollouts, float(num_rollouts)),
        keys.TOP_P: (knobs.top_p * num_rollouts, float(num_rollouts)),
        keys.TOP_K: (float(knobs.top_k * num_rollouts), float(num_rollouts)),
        keys.DECODE_NON_BEAM_COUNT: 0.0 if beam else float(num_rollouts),
        keys.DECODE_BEAM_COUNT: float(num_rollouts) if beam else 0.0,
        keys.REPEAT_TERMINATE_ACTIVE: float(decoding.repeat_terminate.enabled),
    }


def _parsing(outcomes: Sequence[RolloutOutcome]) -> MetricEntries:
    parsed = [outcome.parsed for outcome in outcomes]
    num_samples = float(len(outcomes))
    valid = _total(len(one.objects) for one in parsed)
    invalid = _total(one.dropped_invalid for one in parsed)
    ambiguous = _total(one.dropped_ambiguous for one in parsed)
    truncated = _total(one.truncated for one in parsed)
    started = valid + invalid + ambiguous
    return {
        keys.PARSE_DROPPED_INVALID: invalid,
        keys.PARSE_DROPPED_AMBIGUOUS: ambiguous,
        keys.PARSE_TRUNCATED: truncated,
        keys.PARSE_TRUNCATED_RATE: (truncated, num_samples),
        keys.PARSE_OBJ_TOTAL: started,
        keys.PARSE_OBJ_VALID_FRAC: (valid, started),
        keys.PARSE_OBJ_DROP_FRAC: (invalid + ambiguous, started),
        keys.SAMPLE_VALID_PRED_RATE: (_total(bool(one.objects) for one in parsed), num_samples),
        keys.SAMPLE_ANY_MATCH_RATE: (_total(o.num_supervised > 0 for o in outcomes), num_samples),
    }


def _duplicates(outcomes: Sequence[RolloutOutcome]) -> MetricEntries:
    """Objects are compared in bins: no scale of the axes changes an IoU."""
    rates = [duplicate_rate(objects_of(o.parsed.objects, NUM_BINS, NUM_BINS)) for o in outcomes]
    return {
        keys.DUPLICATE_RATE_MEAN: (sum(rates), float(len(rates))),
        keys.DUPLICATE_RATE_P99: _percentile(rates, 99),
    }


def _matching(outcomes: Sequence[RolloutOutcome]) -> MetricEntries:
    matches = [outcome.match for outcome in outcomes]
    num_gt = _total(outcome.num_gt for outcome in outcomes)
    num_pred = _total(len(outcome.parsed.objects) for outcome in outcomes)
    matched = _total(len(match.matched) for match in matches)
    supervised = _total(outcome.num_supervised for outcome in outcomes)
    rejections = _total(match.gating_rejections for match in matches)
    precision, recall, f1 = Counts.of(supervised, num_pred, num_gt).ratios
    return {
        keys.GT_OBJECTS_TOTAL: num_gt,
        keys.VALID_PRED_OBJECTS_TOTAL: num_pred,
        keys.MATCHED_FOR_SUPERVISION: supervised,
        keys.EXCLUDED_FROM_SUPERVISION: matched - supervised,
        keys.EXCLUDED_RATE: (matched - supervised, matched),
        keys.FN_TOTAL: num_gt - supervised,
        keys.GATING_REJECTIONS: rejections,
        keys.GATING_REJECTION_RATE: (rejections, _total(match.num_candidates for match in matches)),
        keys.PRECISION: precision,
        keys.RECALL: recall,
        keys.F1: f1,
        keys.MATCHED_MASKIOU_MEAN: (sum(match.maskiou_sum for match in matches), matched),
        keys.MATCHED_MASKIOU_COUNT: matched,
    }


def _construction(outcomes: Sequence[RolloutOutcome], fn_desc_weight: float) -> MetricEntries:
    samples = _built(outcomes)
    counts = count_supervision(samples)
    num_gt = _total(outcome.num_gt for outcome in outcomes if isinstance(outcome.sample, EncodedSample))
    masked = 0.0 if fn_desc_weight > 0 else _total(map(_num_tail_desc, samples))
    return {
        keys.FN_APPENDED_TOTAL: num_gt - counts.num_matched,
        keys.PREFIX_COORD_TARGETS_TOTAL: float(counts.num_prefix_coord),
        keys.PREFIX_COORD_TARGETS_PER_MATCHED: (float(counts.num_prefix_coord), float(counts.num_matched)),
        keys.TAIL_IGNORE_FRAC: (masked, _total(map(_tail_length, samples))),
    }


def _oracle(outcomes: Sequence[RolloutOutcome], num_answers: int) -> MetricEntries:
    """What the answers to a question found together."""
    if num_answers == 1:
        return {}
    questions = [outcomes[start : start + num_answers] for start in range(0, len(outcomes), num_answers)]
    found = _total(
        len(found_by_any((gt for _, gt in one.match.matched) for one in answers)) for answers in questions
    )
    return {keys.ORACLE_RECALL: (found, _total(answers[0].num_gt for answers in questions))}


def _edits(outcomes: Sequence[RolloutOutcome], targets: RolloutTargets) -> MetricEntries:
    """What `targets` changed; only what it can change."""
    edits = [sample.edits for sample in _built(outcomes)]
    replaces = targets.replace_above_iou is not None
    counted = {
        "duplicates_dropped": (
            targets.drop_duplicates_above_iou is not None,
            _total(edit.num_duplicates for edit in edits),
        ),
        "replaced": (replaces, _total(edit.num_replaced for edit in edits)),
        "unmatched_dropped": (targets.drop_unmatched, _total(edit.num_unmatched for edit in edits)),
        "missed_written": (
            replaces or targets.missed == "in_order",
            _total(edit.num_written for edit in edits),
        ),
    }
    return {keys.PREFIX_EDITS[name]: number for name, (can_be, number) in counted.items() if can_be}


def _built(outcomes: Sequence[RolloutOutcome]) -> list[EncodedSample]:
    return [outcome.sample for outcome in outcomes if isinstance(outcome.sample, EncodedSample)]


def _tail_length(sample: EncodedSample) -> int:
    """Tokens of the missed objects, the closing `]}` and `<|im_end|>`."""
    return int(np.isin(sample.roles_T, _TAIL_ROLES).sum())


def _num_tail_desc(sample: EncodedSample) -> int:
    """Tokens of the appended records inside descriptions. (One that reaches into the closing is supervised.)"""
    return int(((sample.roles_T == TokenRole.FN_TAIL) & (sample.types_T == TokenType.DESC)).sum())


_SAMPLE_LENGTHS: tuple[tuple[str, str, Callable[[EncodedSample], int]], ...] = (
    (keys.TRAIN_LEN_MEAN, keys.TRAIN_LEN_P90, lambda sample: len(sample.target_ids)),
    (keys.APPEND_LEN_MEAN, keys.APPEND_LEN_P90, _tail_length),
    (keys.ENCODED_LEN_MEAN, keys.ENCODED_LEN_P90, lambda sample: sample.num_tokens),
)


def _lengths(outcomes: Sequence[RolloutOutcome]) -> MetricEntries:
    """Prompt and rollout of every outcome; target (prefix and tail), tail and whole sample of those that gave one."""
    prompts = [len(outcome.rollout.prompt_token_ids) for outcome in outcomes]
    responses = [len(outcome.parsed.response_token_ids) for outcome in outcomes]
    metrics = {
        **_length(keys.PROMPT_LEN_MEAN, keys.PROMPT_LEN_P90, prompts),
        **_length(keys.ROLLOUT_LEN_MEAN, keys.ROLLOUT_LEN_P90, responses),
    }
    for mean_key, p90_key, length_of in _SAMPLE_LENGTHS:
        metrics |= _length(mean_key, p90_key, list(map(length_of, _built(outcomes))))
    return metrics


def _length(mean_key: str, p90_key: str, lengths: Sequence[int]) -> MetricEntries:
    if not lengths:
        return {}
    return {mean_key: (float(sum(lengths)), float(len(lengths))), p90_key: _percentile(lengths, 90)}


def _percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default."""
    return float(np.percentile(values, percent))


def _total(values: Iterable[int]) -> float:
    return float(sum(values))
