"""The catalogue of metric keys: the only place a key is written. No torch.

The keys and their constants stand in the `keys_*` files beside this one, section by section, and code
imports them from there (`keys_stage1.BASE_CE_LOSS`, `keys_stage2.loss_atom("A2_coord", "bbox_ciou")`).
`lookup` says what a key means and how it is reduced; runbooks/metrics.md is printed from the same data.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from coordexp.errors import ContractError
from coordexp.metrics import (
    keys_control,
    keys_datasets,
    keys_rollout,
    keys_run,
    keys_stage1,
    keys_stage2,
    keys_tokens,
)
from coordexp.metrics.spec import KeySection, Kind, MetricSpec, Reduce

__all__ = [
    "EVAL_PREFIX",
    "SECTIONS",
    "STRICT_ENV",
    "Kind",
    "MetricSpec",
    "Reduce",
    "all_specs",
    "check_known",
    "is_helper",
    "known_instead",
    "lookup",
    "nearest",
    "removed_hint",
    "resolve",
    "strict_by_environment",
]

logger = logging.getLogger(__name__)

EVAL_PREFIX = "eval_"
STRICT_ENV = "COORDEXP_STRICT_METRICS"

SECTIONS: tuple[KeySection, ...] = (
    *keys_stage1.SECTIONS,
    *keys_tokens.SECTIONS,
    *keys_stage2.SECTIONS,
    *keys_rollout.SECTIONS,
    *keys_datasets.SECTIONS,
    *keys_control.SECTIONS,
    *keys_run.SECTIONS,
)


def _collect(sections: Iterable[KeySection]) -> dict[str, MetricSpec]:
    collected: dict[str, MetricSpec] = {}
    for section in sections:
        for spec in section:
            if spec.key in collected:
                raise ValueError(f"metric key {spec.key!r} is defined in two sections")
            collected[spec.key] = spec
    return collected


_SPECS = _collect(SECTIONS)

_REMOVED: tuple[tuple[str, str], ...] = (
    (r"loss/token_ce_obj", "loss/<provenance>/struct_ce and loss/<provenance>/desc_ce"),
    (r"loss/bbox_geo_obj", "loss/<provenance>/bbox_smoothl1 and loss/<provenance>/bbox_ciou"),
    (r"loss/coord_reg_obj", "the coordinate atoms under loss/A2_coord/ and loss/B_coord/"),
    (r"obj/([^/]+)/([^/]+)", r"loss/\1/\2"),
    (r"loss/ce", "loss/<provenance>/struct_ce and loss/<provenance>/desc_ce"),
    (r"loss/coord(_prefix|_tail)?", "the coordinate atoms under loss/A2_coord/ and loss/B_coord/"),
    (r"loss/[^/]+/(geo|coord_reg)", "the single atoms of that provenance"),
    (r"rollout/(bbox|segm)_.+", "rollout/mAP (the full COCO summary comes from `coordexp eval`)"),
)
"""Names that were logged once: pattern of the whole key -> what replaced it."""


def lookup(key: str) -> MetricSpec | None:
    """The spec of `key`, or None for a key the catalogue does not know.

    An evaluation key (`eval_coord_diag/loss`) gets the spec of its training name, with the prefixed key; a key of one
    data set (`dataset/coco/rollout/f1`) that of its pattern.
    """
    spec = _training_spec(key)
    if spec is not None:
        return spec
    train_spec = _training_spec(key.removeprefix(EVAL_PREFIX))
    if train_spec is None or train_spec.key.startswith(EVAL_PREFIX):
        return None
    return replace(train_spec, key=key, pattern=EVAL_PREFIX + train_spec.family)


def _training_spec(key: str) -> MetricSpec | None:
    pattern = keys_datasets.pattern_of(key) or keys_control.pattern_of(key)
    if pattern is None or pattern == key:
        return _SPECS.get(key)
    spec = _SPECS.get(pattern)
    return None if spec is None else replace(spec, key=key, pattern=pattern)


def all_specs() -> Iterator[MetricSpec]:
    """Every spec under its training name, in the order of the reference page."""
    return iter(_SPECS.values())


def is_helper(key: str) -> bool:
    """Whether a part of `key` starts with an underscore: a reduction helper, which never leaves."""
    return any(part.startswith("_") for part in key.split("/"))


def removed_hint(key: str) -> str | None:
    """What replaced a key that earlier releases of this method logged, or None."""
    name = key.removeprefix(EVAL_PREFIX)
    for pattern, replacement in _REMOVED:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def nearest(key: str) -> str | None:
    """The catalogue key most like `key` (same `eval_` prefix), or None when nothing is close."""
    prefix = EVAL_PREFIX if key.startswith(EVAL_PREFIX) else ""
    close = difflib.get_close_matches(key.removeprefix(EVAL_PREFIX), _SPECS, n=1)
    return prefix + close[0] if close else None


def known_instead(key: str) -> str:
    """How a sentence about a key that the catalogue does not know ends: with what replaced it, or what is like it."""
    replaced, near = removed_hint(key), nearest(key)
    if replaced is not None:
        return f"; it was replaced by {replaced}."
    return "." if near is None else f"; did you mean {near}?"


def resolve(key: str, *, strict: bool | None = None) -> MetricSpec:
    """The spec of `key`; an unknown key is an error (strict) or warned of once and guessed from its name.

    Args:
        key: the key as it is logged.
        strict: None reads the environment variable COORDEXP_STRICT_METRICS.

    Raises:
        ContractError: unknown key under `strict`.
    """
    spec = lookup(key)
    if spec is not None:
        return spec
    message = f"metric key {key!r} is not in the catalogue{known_instead(key)} Define it in coordexp/metrics/keys_*.py."
    if strict_by_environment() if strict is None else strict:
        raise ContractError(message)
    guessed = _guess(key)
    if key not in _warned:
        _warned.add(key)
        logger.warning(
            "%s It is logged as a %s (reduced by %s).", message, guessed.kind.value, guessed.reduce.value
        )
    return guessed


def check_known(keys: Iterable[str], *, strict: bool | None = None) -> None:
    """Apply `resolve` to every key that is about to leave; helpers are passed over."""
    for key in keys:
        if not is_helper(key):
            resolve(key, strict=strict)


def strict_by_environment() -> bool:
    """Whether COORDEXP_STRICT_METRICS asks for an error on unknown keys (tests set it)."""
    return os.environ.get(STRICT_ENV, "") not in ("", "0")


_warned: set[str] = set()

_COUNTER_NAME = re.compile(r".*(_total|_count|_sum|_num|_den)|(.*/)?N_[^/]*|.*/strict_drop/.*")
_RATE_NAME = re.compile(r".*(_rate|_frac)|(.*/)?(precision|recall|f1)")


def _guess(key: str) -> MetricSpec:
    """A spec by the naming rules, for a key that is not in the catalogue."""
    if _COUNTER_NAME.fullmatch(key):
        kind, reduce = Kind.COUNTER, Reduce.SUM
    elif _RATE_NAME.fullmatch(key):
        kind, reduce = Kind.RATE, Reduce.MEAN
    elif key.startswith("time/"):
        kind, reduce = Kind.SECONDS, Reduce.MAX
    elif key.endswith("p99"):
        kind, reduce = Kind.PERCENTILE, Reduce.MAX
    else:
        kind, reduce = Kind.GAUGE, Reduce.MEAN
    return MetricSpec(key, "unknown", kind, reduce, False, "unknown", "Not in the catalogue.")
