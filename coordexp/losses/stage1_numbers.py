"""Numbers of a stage-1 run beside the terms themselves: per original sample, and the parts of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordexp.losses.stage1 import Stage1Terms
from coordexp.losses.sums import divide
from coordexp.metrics.catalog import EVAL_PREFIX
from coordexp.metrics.keys_datasets import DATASET_LOSS, dataset_key
from coordexp.metrics.keys_stage1 import (
    BASE_CE_LOSS,
    BASE_CE_LOSS_PER_SAMPLE,
    BASE_CE_NONCOORD_TOKENS,
    BASE_CE_NONCOORD_TOKENS_PER_SAMPLE,
    COORD_DIAG_COORD_TOKENS,
    COORD_DIAG_COORD_TOKENS_PER_SAMPLE,
    COORD_DIAG_LOSS,
    COORD_DIAG_LOSS_PER_SAMPLE,
    STAGE1_TOTAL_LOSS_PER_SAMPLE_EST,
)


def per_sample_sums(terms: Stage1Terms, num_samples: int) -> dict[str, tuple[Tensor, float]]:
    """What packed runs log per original sample, of one micro-batch: sums over tokens, counts of samples.

    Over a window these are `base_ce/loss * base_ce/noncoord_tokens / pack/num_samples` and its likes, whatever
    the sizes of the packs.
    """
    count = float(num_samples)
    return {
        BASE_CE_NONCOORD_TOKENS_PER_SAMPLE: (terms.text.count, count),
        BASE_CE_LOSS_PER_SAMPLE: (terms.text.sum.detach(), count),
        COORD_DIAG_COORD_TOKENS_PER_SAMPLE: (terms.coord.count, count),
        COORD_DIAG_LOSS_PER_SAMPLE: (terms.coord.sum.detach(), count),
    }


def part_sums(terms: Stage1Terms, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of every data set of a mixture, of one micro-batch; `names` in the order of its parts.

    Empty without a mixture.
    """
    if not terms.by_part:
        return {}
    text, coord = terms.by_part["text"], terms.by_part["coord"]
    ones = torch.ones_like(text.count[0])
    numbers = {}
    for place, name in enumerate(names):
        numbers[dataset_key(name, BASE_CE_LOSS)] = (text.sum[place], text.count[place])
        numbers[dataset_key(name, BASE_CE_NONCOORD_TOKENS)] = (text.count[place], ones)
        numbers[dataset_key(name, COORD_DIAG_LOSS)] = (coord.sum[place], coord.count[place])
        numbers[dataset_key(name, COORD_DIAG_COORD_TOKENS)] = (coord.count[place], ones)
    return numbers


def part_losses(terms: Stage1Terms, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The loss of every data set of a mixture in the pure-CE ablation, where it is one mean over all rows."""
    if "coord_ce" not in terms.by_part:
        return {}
    text, coord = terms.by_part["text"], terms.by_part["coord_ce"]
    return {
        dataset_key(name, DATASET_LOSS): (
            text.sum[place] + coord.sum[place],
            text.count[place] + coord.count[place],
        )
        for place, name in enumerate(names)
    }


def finish_parts(metrics: dict[str, float], mode: str, names: Sequence[str]) -> None:
    """Complete a flushed window: no token count of a data set that had none; in evaluation the loss of every other."""
    prefix = EVAL_PREFIX if mode == "eval" else ""
    for name in names:
        for loss, tokens in (
            (BASE_CE_LOSS, BASE_CE_NONCOORD_TOKENS),
            (COORD_DIAG_LOSS, COORD_DIAG_COORD_TOKENS),
        ):
            if prefix + dataset_key(name, loss) not in metrics:
                metrics.pop(prefix + dataset_key(name, tokens), None)
        text = metrics.get(prefix + dataset_key(name, BASE_CE_LOSS))
        if mode == "eval" and text is not None:  # in the ablation it is there already
            coord = metrics.get(prefix + dataset_key(name, COORD_DIAG_LOSS), 0.0)
            metrics.setdefault(prefix + dataset_key(name, DATASET_LOSS), text + coord)


def finish_per_sample(metrics: dict[str, float], mode: str) -> None:
    """Complete a flushed window of a packed run: the total, and no number per sample for absent tokens."""
    prefix = EVAL_PREFIX if mode == "eval" else ""
    if prefix + BASE_CE_LOSS not in metrics:
        _drop(metrics, prefix, BASE_CE_NONCOORD_TOKENS_PER_SAMPLE, BASE_CE_LOSS_PER_SAMPLE)
    if prefix + COORD_DIAG_LOSS not in metrics:
        _drop(metrics, prefix, COORD_DIAG_COORD_TOKENS_PER_SAMPLE, COORD_DIAG_LOSS_PER_SAMPLE)
    parts = [prefix + key for key in (BASE_CE_LOSS_PER_SAMPLE, COORD_DIAG_LOSS_PER_SAMPLE)]
    if any(key in metrics for key in parts):
        metrics[prefix + STAGE1_TOTAL_LOSS_PER_SAMPLE_EST] = sum(metrics.get(key, 0.0) for key in parts)


def loss_shares(
    terms: Stage1Terms, text_count: Tensor | float, coord_count: Tensor | float
) -> dict[str, float]:
    """The parts that the loss of a micro-batch must be the sum of, on the host (debug mode)."""
    if terms.coord_ce is None:
        parts = {"text": divide(terms.text.sum, text_count), "coord": divide(terms.coord.sum, coord_count)}
    else:
        count = text_count + coord_count
        parts = {"text": divide(terms.text.sum, count), "coord_ce": divide(terms.coord_ce.sum, count)}
    return {name: float(part) for name, part in parts.items()}


def _drop(metrics: dict[str, float], prefix: str, *keys: str) -> None:
    for key in keys:
        metrics.pop(prefix + key, None)
