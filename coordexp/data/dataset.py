"""Records -> conversations: what the model is asked, and for training what it must answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coordexp.codec.records import Record, iter_jsonl, order_objects
from coordexp.codec.serialize import serialize
from coordexp.data.source import SOURCE_COLUMN, source_of
from coordexp.errors import RecordError


def conversation(record: Record, *, prompt: str) -> dict[str, Any]:
    """The question about one record: `{"messages": [user turn], "images": [absolute paths]}`.

    One `<image>` placeholder per image stands before the prompt text.
    """
    images = [str(path.resolve()) for path in record.image_paths()]
    return {
        "messages": [{"role": "user", "content": "<image>" * len(images) + prompt}],
        "images": images,
    }


def training_row(
    record: Record, *, prompt: str, field_order: str = "desc_first", ordering: str = "sorted", seed: int = 0
) -> dict[str, Any]:
    """The question, its CoordJSON answer and where it came from, as one ms-swift row.

    `ordering="random"` shuffles with a seed of its own per line, so that rows do not depend on their neighbours.
    """
    row = conversation(record, prompt=prompt)
    objects = order_objects(record.objects, ordering, seed=seed * 1_000_003 + (record.line or 0))
    row["messages"].append({"role": "assistant", "content": serialize(objects, field_order)})
    row[SOURCE_COLUMN] = source_of(record).to_text()
    return row


def read_rows(path: str | Path, row_of: Callable[[Record], dict[str, Any]]) -> list[dict[str, Any]]:
    """`row_of` of all records of a JSONL file, validated before the first one is used.

    Raises:
        RecordError: a line breaks the contract, an image is missing, or the file holds no record.
    """
    rows = [row_of(record) for record in iter_jsonl(path, require_images=True)]
    if not rows:
        raise RecordError(f"{path}: holds no record; expected one JSON object per line.")
    return rows


def read_training_rows(
    path: str | Path,
    *,
    prompt: str,
    field_order: str = "desc_first",
    ordering: str = "sorted",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """All training rows of a JSONL file; errors as in `read_rows`."""
    return read_rows(
        path,
        partial(training_row, prompt=prompt, field_order=field_order, ordering=ordering, seed=seed),
    )
