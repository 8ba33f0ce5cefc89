"""Our data sets in place of those that ms-swift hands over: encoded samples in stage 1, questions in stage 2."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset

from coordexp.config.schema.augmentation import Augmentation
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.dataset import RowMaker
from coordexp.data.lengths import check_lengths
from coordexp.data.raw_samples import RawSamples
from coordexp.data.samples import EncodedSamples
from coordexp.data.shown import InTurn, ShownRows
from coordexp.swift_bridge.packing import replace_packed
from coordexp.swift_bridge.prompts import rows_of
from coordexp.trainers.runtime import RunSettings

TRAIN, EVAL = "train_dataset", "eval_dataset"
"""Arguments of a trainer."""


def encode_datasets(arguments: dict[str, Any], settings: RunSettings) -> None:
    """Replace the data sets among the trainer's `arguments` by `EncodedSamples` of the same rows, packed or not.

    Raises RecordError naming samples that are longer than max_length, unless the run is not strict.
    """
    template, strict = arguments["template"], settings.swift["strict"]

    def encoded(lazy: Any, *, name: str) -> EncodedSamples:
        rows = rows_of(lazy)
        if strict:
            check_lengths(rows, template, largest_scale=_largest_scale(settings, name))
        return EncodedSamples(
            shown_rows(rows, settings, name), template, strict=strict, seed=_data_seed(settings)
        )

    for name in (TRAIN, EVAL):
        if arguments.get(name) is not None:
            arguments[name] = replace_packed(arguments[name], partial(encoded, name=name))


def question_datasets(
    arguments: dict[str, Any], settings: RunSettings, *, samples_per_step: int, packing_length: int | None
) -> None:
    """Replace the data sets among the trainer's `arguments` by `RawSamples` of the same rows.

    samples_per_step: of all ranks; an epoch is filled up to whole steps.  packing_length: of a step's targets, if any.
    Raises RecordError naming training samples that are longer than max_length or a pack.
    """
    for name, multiple_of in ((TRAIN, samples_per_step), (EVAL, 1)):
        rows, template = rows_of(arguments.get(name)), arguments["template"]
        if rows is not None and name == EVAL and settings.eval_prompt_variant is not None:
            rows = rows.with_transform(RowMaker(settings.eval_prompt, _data_seed(settings)))
        if rows is not None and name == TRAIN:
            check_lengths(
                rows, template, packing_length=packing_length, largest_scale=_largest_scale(settings, name)
            )
        arguments[name] = (
            None if rows is None else RawSamples(shown_rows(rows, settings, name, multiple_of), template)
        )


def shown_rows(rows: Dataset, settings: RunSettings, name: str, multiple_of: int = 1) -> ShownRows:
    """The rows of one of the data sets as they are shown in training or in evaluation.

    name: TRAIN or EVAL; pictures of training alone are changed.
    """
    seed = _data_seed(settings)
    augmentation = _augmentation(settings, name)
    return ShownRows(
        rows,
        order=InTurn(len(rows), multiple_of),
        augmenter=None if augmentation is None else Augmenter(augmentation, seed),
        maker=RowMaker(settings.prompt, seed),
    )


def _augmentation(settings: RunSettings, name: str) -> Augmentation | None:
    found = settings.sections.custom.augmentation
    return found if found.enabled and name == TRAIN else None


def _largest_scale(settings: RunSettings, name: str) -> float:
    augmentation = _augmentation(settings, name)
    return 1.0 if augmentation is None else augmentation.largest_scale


def _data_seed(settings: RunSettings) -> int:
    seed, data_seed = settings.swift["seed"], settings.swift["data_seed"]
    return int(seed if data_seed is None else data_seed)
