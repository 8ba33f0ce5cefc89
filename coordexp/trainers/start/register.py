"""What a run needs before ms-swift loads anything: a tokenizer that can write coordinates, and its data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config import Prompt, Sections
from coordexp.config.schema.answer_form import writes_numbers
from coordexp.data.source import DatasetFilter
from coordexp.data.store.open import open_records
from coordexp.errors import ConfigError
from coordexp.swift_bridge.arguments import PluginFlags
from coordexp.swift_bridge.dataset import register_jsonl

logger = logging.getLogger(__name__)

MakeRows = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]
"""A transform of stored records: columns to the columns of rows."""


def checked_tokenizer(model: str | None, prompt: Prompt) -> Any:
    """The tokenizer of a local model folder; None for a hub id, which is checked when the trainer starts.

    Raises ConfigError where it lacks the coordinate tokens that the form of the answer has.
    """
    if model is None or not Path(model).is_dir():
        return None
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(model)
    if not writes_numbers(prompt.answer_form):
        CoordVocab.from_tokenizer(tok)
    return tok


def register_datasets(flags: PluginFlags, sections: Sections, rows_of: MakeRows) -> set[str]:
    """Open every data file now, which checks a new one; ms-swift asks for the rows later. Returns names of datasets."""
    debug, swift = sections.debug, flags.swift
    both = set(swift["dataset"]) & set(swift["val_dataset"])
    if both and debug.train_sample_limit != debug.val_sample_limit:
        raise ConfigError(
            f"{min(both)} is both dataset and val_dataset; expected equal debug.train_sample_limit and "
            f"debug.val_sample_limit, found {debug.train_sample_limit} and {debug.val_sample_limit}."
        )
    names: set[str] = set()

    def serve(path: str, limit: int | None) -> Dataset:
        store = open_records(path)
        names.update(store.datasets)
        table = store.table if limit is None else store.table.select(range(min(limit, len(store.table))))
        return table.with_transform(rows_of)

    register_jsonl(swift["dataset"], partial(serve, limit=debug.train_sample_limit))
    register_jsonl(swift["val_dataset"], partial(serve, limit=debug.val_sample_limit))
    return names


def warn_if_no_type_counts(sections: Sections, names: set[str]) -> None:
    """Say so when token types are asked for and no sample's dataset is among those that count."""
    settings = sections.custom.token_type_metrics
    complaint = DatasetFilter(tuple(settings.include), tuple(settings.exclude)).complaint(names)
    if settings.enabled and complaint is not None:
        logger.warning(
            "custom.token_type_metrics: %s Accuracy by token type and coord_monitor/* stay absent.", complaint
        )
