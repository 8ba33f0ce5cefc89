"""Our data sets in place of those that ms-swift hands over: encoded samples in stage 1, questions in stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset

from coordexp.config import Prompt
from coordexp.config.run.data_files import files_of_sources
from coordexp.config.schema.augmentation import Augmentation
from coordexp.data.augment.augmenter import Augmenter
from coordexp.data.chosen import ChosenSamples
from coordexp.data.dataset import RowMaker
from coordexp.data.lengths import check_lengths, warn_of_short_answers
from coordexp.data.mixed import MixedOrder, open_mixed
from coordexp.data.raw_samples import RawSamples
from coordexp.data.samples import EncodedSamples, MarkSample
from coordexp.data.shown import InTurn, Order, ShownRows
from coordexp.swift_bridge.packing import replace_packed, unpacked
from coordexp.swift_bridge.prompts import rows_of
from coordexp.trainers.runtime import RunSettings

TRAIN, EVAL = "train_dataset", "eval_dataset"
"""Arguments of a trainer."""


def encode_datasets(arguments: dict[str, Any], settings: RunSettings, also: MarkSample | None = None) -> None:
    """Replace the data sets among the trainer's `arguments` by `EncodedSamples` of the same rows, packed or not.

    also: see `EncodedSamples`.

    Raises RecordError naming samples that are longer than max_length, unless the run is not strict.
    """
    template, strict = arguments["template"], settings.swift["strict"]
    samples_per_step = _keep_order(arguments, settings)

    def encoded(lazy: Any, *, name: str) -> EncodedSamples:
        shown = shown_rows(rows_of(lazy), settings, name, samples_per_step)
        if strict:
            check_lengths(shown.rows, template, largest_scale=_largest_scale(settings, name))
        return EncodedSamples(shown, template, strict=strict, seed=_data_seed(settings), also=also)

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
    _keep_order(arguments, settings)
    rollout = settings.sections.rollout_matching
    for name, multiple_of in ((TRAIN, samples_per_step), (EVAL, 1)):
        rows, template = rows_of(arguments.get(name)), arguments["template"]
        if rows is None:
            arguments[name] = None
            continue
        prompt = settings.eval_prompt if name == EVAL and settings.eval_prompt_variant is not None else None
        shown = shown_rows(rows, settings, name, multiple_of, prompt)
        if name == TRAIN:
            check_lengths(
                shown.rows,
                template,
                packing_length=packing_length,
                largest_scale=_largest_scale(settings, name),
            )
        if rollout is not None:
            warn_of_short_answers(shown.rows, template.tokenizer, rollout.max_new_tokens)
        arguments[name] = RawSamples(shown, template)


def samples_of_a_step(args: Any) -> int:
    """Samples of an optimizer step, of all ranks, by the arguments of a trainer."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def evaluation_questions(
    arguments: dict[str, Any], settings: RunSettings, most: int | None
) -> ChosenSamples | None:
    """Samples of the evaluation set among the trainer's `arguments`, as questions; None without a set.

    most: None for all. The first ones; of a mixture, whose data sets stand one after another, some of each.
    """
    rows = rows_of(unpacked(arguments.get(EVAL)))
    if rows is None:
        return None
    prompt = settings.eval_prompt if settings.eval_prompt_variant is not None else None
    questions = RawSamples(shown_rows(rows, settings, EVAL, prompt=prompt), arguments["template"])
    total = len(questions)
    number = min(total, most or total)
    spread = settings.sections.custom.fusion is not None
    return ChosenSamples(questions, [n * total // number if spread else n for n in range(number)])


def probe_questions(arguments: dict[str, Any], settings: RunSettings) -> ChosenSamples | None:
    """What `telemetry.trajectory_probe` looks at, from the trainer's `arguments` as they came; None: it is off."""
    probe = settings.sections.telemetry.trajectory_probe
    if probe.every_steps is None or settings.sections.custom.dry_run is not None:
        return None
    return evaluation_questions(arguments, settings, probe.num_samples)


def shown_rows(
    rows: Dataset,
    settings: RunSettings,
    name: str,
    multiple_of: int = 1,
    prompt: Prompt | None = None,
) -> ShownRows:
    """The rows of one of the data sets as they are shown in training or in evaluation.

    name: TRAIN or EVAL; pictures of training alone are changed.
    multiple_of: of the length of an epoch; `custom.fusion` has rows of its own in place of `rows`.
    prompt: in place of the run's.
    """
    seed = _data_seed(settings)
    augmentation = _augmentation(settings, name)
    maker = RowMaker(prompt or settings.prompt, seed)
    augmenter = None if augmentation is None else Augmenter(augmentation, seed)
    fusion = settings.sections.custom.fusion
    if fusion is None:
        if prompt is not None:
            rows = rows.with_transform(maker)
        return ShownRows(rows, order=InTurn(len(rows), multiple_of), augmenter=augmenter, maker=maker)
    debug = settings.sections.debug
    mixed = open_mixed(
        files_of_sources(fusion, validation=name == EVAL),
        maker,
        debug.train_sample_limit if name == TRAIN else debug.val_sample_limit,
    )
    order: Order = (
        InTurn(len(mixed.rows))
        if name == EVAL
        else MixedOrder.of(
            mixed,
            [source.weight for source in fusion.sources],
            seed=seed,
            stopping_strategy=fusion.stopping_strategy,
            samples_per_epoch=fusion.samples_per_epoch,
            multiple_of=multiple_of,
            shuffled=bool(settings.swift["train_dataloader_shuffle"]),
        )
    )
    return ShownRows(mixed.rows, order=order, augmenter=augmenter, maker=maker, part_of=mixed.name_of)


def _keep_order(arguments: Mapping[str, Any], settings: RunSettings) -> int:
    """A mixture has an order of its own, in which its samples must be taken; packs of it are shuffled.

    Returns what its epoch must be a multiple of: the samples of a step, 1 where they are packed.
    """
    if settings.sections.custom.fusion is None or settings.sections.training.packing:
        return 1
    arguments["args"].train_dataloader_shuffle = False
    return samples_of_a_step(arguments["args"])


def _augmentation(settings: RunSettings, name: str) -> Augmentation | None:
    found = settings.sections.custom.augmentation
    return found if found.enabled and name == TRAIN else None


def _largest_scale(settings: RunSettings, name: str) -> float:
    augmentation = _augmentation(settings, name)
    return 1.0 if augmentation is None else augmentation.largest_scale


def _data_seed(settings: RunSettings) -> int:
    return int(settings.swift["data_seed"])
