"""Metric keys of the single data sets of a mixture: `dataset/<name>/<key>`, by the name of a source."""

from __future__ import annotations

import re

from coordexp.metrics import keys_rollout, keys_stage1
from coordexp.metrics.spec import KeySection, Kind, MetricSpec

FUSED = "with `custom.fusion`"
ANY_NAME = "<name>"


def dataset_key(name: str, key: str) -> str:
    """The key of one data set for a number that exists for all of them together."""
    return f"dataset/{name}/{key}"


DATASETS = KeySection(
    "By data set (`dataset/<name>/*`)",
    "In runs with `custom.fusion`, for every source under its name. A key that also exists without the prefix is the "
    "same number over the samples of that source alone: counts add up to the whole, and so do losses weighted with "
    "their token counts.",
)

DATASET_SAMPLES_TOTAL = "samples_total"
DATASETS.define(
    dataset_key(ANY_NAME, DATASET_SAMPLES_TOTAL),
    Kind.COUNTER,
    "Samples of the data set that were trained on in the logging window.",
    unit="samples",
    when=FUSED,
)
DATASET_SAMPLES_SEEN = "samples_seen"
DATASETS.define(
    dataset_key(ANY_NAME, DATASET_SAMPLES_SEEN),
    Kind.GAUGE,
    "Samples of the data set since the run began, of all ranks; a resume goes on counting.",
    unit="samples",
    when=FUSED,
)
DATASET_SHARE = "share"
DATASETS.define(
    dataset_key(ANY_NAME, DATASET_SHARE),
    Kind.GAUGE,
    "The same over those of all data sets: the share that its weight asks for.",
    unit="fraction",
    when=FUSED,
)
DATASET_LOSS = "loss"
DATASETS.define(
    dataset_key(ANY_NAME, DATASET_LOSS),
    Kind.LOSS,
    "The stage-1 objective over the data set's validation records.",
    unit="nats",
    when=f"evaluation (as `eval_dataset/...`), {FUSED}, in stage 1",
    over="supervised tokens",
)

STAGE1_BY_DATASET = (
    keys_stage1.BASE_CE_LOSS,
    keys_stage1.BASE_CE_NONCOORD_TOKENS,
    keys_stage1.COORD_DIAG_LOSS,
    keys_stage1.COORD_DIAG_COORD_TOKENS,
)
"""What stage 1 logs of every data set, in training and in evaluation."""
ROLLOUTS_BY_DATASET = (
    keys_rollout.PRECISION,
    keys_rollout.RECALL,
    keys_rollout.F1,
    keys_rollout.GT_OBJECTS_TOTAL,
    keys_rollout.VALID_PRED_OBJECTS_TOTAL,
    keys_rollout.MATCHED_FOR_SUPERVISION,
)
"""What a step with rollouts logs of every data set."""
EVALUATION_BY_DATASET = (
    keys_rollout.PRECISION,
    keys_rollout.RECALL,
    keys_rollout.F1,
    keys_rollout.PRED_OBJECTS,
    keys_rollout.GT_OBJECTS,
    keys_rollout.MATCHED,
    keys_rollout.PARSE_TRUNCATED_RATE,
    keys_rollout.MAP,
    keys_rollout.F1_50_95,
)
"""What evaluation by rollouts reports of every data set, as far as it reports it of all together."""


def _define_split(spec: MetricSpec) -> None:
    DATASETS.define(
        dataset_key(ANY_NAME, spec.key),
        spec.kind,
        f"`{spec.key}` of the data set.",
        unit=spec.unit,
        when=f"{spec.when}; {FUSED}",
        reduce=spec.reduce,
        over=spec.over,
        better=spec.better,
    )


_WHOLE = {
    spec.key: spec
    for section in (keys_stage1.BASE_CE, keys_stage1.COORD_DIAG, keys_rollout.ROLLOUT)
    for spec in section
}
for _key in dict.fromkeys((*STAGE1_BY_DATASET, *ROLLOUTS_BY_DATASET, *EVALUATION_BY_DATASET)):
    _define_split(_WHOLE[_key])

SECTIONS = (DATASETS,)


def pattern_of(key: str) -> str | None:
    """The key with its data set's name taken out, None where it has none."""
    match = re.fullmatch(r"dataset/[^/]+/(.+)", key)
    return None if match is None else dataset_key(ANY_NAME, match[1])
