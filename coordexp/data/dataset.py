"""Records -> conversations: what the model is asked, and for training what it must answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from coordexp.codec.forms.choose import form_of
from coordexp.codec.records import Record, order_objects
from coordexp.config.schema.prompt import Prompt
from coordexp.data.source import SOURCE_COLUMN, source_of
from coordexp.data.store.columns import record_from_text, record_of, record_text
from coordexp.data.store.open import open_records
from coordexp.errors import RecordError

RECORD_COLUMN = "coordexp_record"
"""Where a row carries its record (see `record_in`), objects in the order in which they are taught."""


def conversation(record: Record, prompt: Prompt) -> dict[str, Any]:
    """The question about one record: `{"messages": [system and user turn], "images": [absolute paths]}`.

    Raises RecordError for a prompt with a place for the names that are asked for, and a record that names none.
    """
    if prompt.names_classes and record.classes is None:
        raise RecordError(
            f"{record.file}:{record.line}: names no classes, and the prompt has a place for them ({prompt.user!r}). "
            'Write "classes": [names], or ask with a prompt without {classes}'
        )
    images = [str(path.resolve()) for path in record.image_paths()]
    return {"messages": prompt.messages(len(images), record.classes), "images": images}


@dataclass(frozen=True)
class RowMaker:
    """How records become rows that ms-swift trains on.

    prompt: the question, and the form of the answer.
    seed: of the random order, which differs from record to record, but does not depend on its neighbours.
    """

    prompt: Prompt
    seed: int = 0

    def ordered(self, record: Record) -> Record:
        """The record with its objects in the order in which they are taught."""
        seed = self.seed * 1_000_003 + (record.line or 0)
        return replace(
            record, objects=tuple(order_objects(record.objects, self.prompt.object_ordering, seed=seed))
        )

    def row(self, record: Record) -> dict[str, Any]:
        """The question, its answer, where it came from, and the record itself (objects ordered)."""
        ordered = self.ordered(record)
        row = conversation(ordered, self.prompt)
        answer = form_of(self.prompt.answer_form, self.prompt.object_field_order).serialize(ordered.objects)
        row["messages"].append({"role": "assistant", "content": answer})
        row[SOURCE_COLUMN] = source_of(ordered).to_text()
        row[RECORD_COLUMN] = record_text(ordered)
        return row

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows of stored records, as a transform of a `datasets.Dataset`; a part of their columns stays as it is."""
        if "bins" not in columns:
            return columns
        stored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = [self.row(record_of(values)) for values in stored]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def record_in(row: Mapping[str, Any]) -> Record:
    """The record that a row was made of, its objects in the order in which they are taught."""
    return record_from_text(row[RECORD_COLUMN])


def images_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of a row's images; ms-swift may wrap one as `{"bytes": None, "path": ...}`."""
    return tuple(str(image["path"] if isinstance(image, Mapping) else image) for image in row["images"])


def read_training_rows(path: str | Path, prompt: Prompt, *, seed: int = 0) -> Dataset:
    """The training rows of a JSONL file, made when they are asked for.

    Raises:
        RecordError: as `open_records`: a line breaks the contract, an image is missing, or the file holds no record.
    """
    return open_records(path).table.with_transform(RowMaker(prompt, seed))
