"""The columns of a record in an Arrow table, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from coordexp.codec.records import Record
from coordexp.codec.schema import KIND_BBOX, KIND_POLY, BoxObject

SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("dataset", pa.string()),
        ("images", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("descs", pa.list_(pa.string())),
        ("is_poly", pa.list_(pa.bool_())),
        ("bins", pa.list_(pa.list_(pa.int16()))),
        ("summary", pa.string()),
        ("metadata", pa.string()),
        ("classes", pa.list_(pa.string())),
        ("num_coords", pa.int32()),
        ("desc_bytes", pa.int32()),
        ("class_bytes", pa.int32()),
    ]
)
"""file: absolute path.  images: as written.  metadata: JSON text.

num_coords: of all objects.  desc_bytes: of all descriptions in JSON, with their quotation marks.  class_bytes: of the
classes in a question, a comma and a blank between them.
"""


def batch_of(records: Sequence[Record], datasets: Sequence[str]) -> pa.RecordBatch:
    """Records that were read from files, as rows. datasets: the data set of each."""
    columns: dict[str, list[Any]] = {
        "file": [record.file for record in records],
        "line": [record.line for record in records],
        "dataset": list(datasets),
        "images": [record.images for record in records],
        "width": [record.width for record in records],
        "height": [record.height for record in records],
        "descs": [[obj.desc for obj in record.objects] for record in records],
        "is_poly": [[obj.kind == KIND_POLY for obj in record.objects] for record in records],
        "bins": [[obj.bins for obj in record.objects] for record in records],
        "summary": [record.summary for record in records],
        "metadata": [None if record.metadata is None else json.dumps(record.metadata) for record in records],
        "classes": [record.classes for record in records],
        "num_coords": [sum(len(obj.bins) for obj in record.objects) for record in records],
        "desc_bytes": [sum(_json_bytes(obj.desc) for obj in record.objects) for record in records],
        "class_bytes": [len(", ".join(record.classes or ()).encode()) for record in records],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def record_of(row: Mapping[str, Any]) -> Record:
    """The record that a row was made of; its file is the absolute path."""
    objects = zip(row["descs"], row["is_poly"], row["bins"], strict=True)
    return Record(
        images=tuple(row["images"]),
        width=row["width"],
        height=row["height"],
        objects=tuple(
            BoxObject(desc, KIND_POLY if is_poly else KIND_BBOX, tuple(bins))
            for desc, is_poly, bins in objects
        ),
        summary=row["summary"],
        metadata=None if row["metadata"] is None else json.loads(row["metadata"]),
        file=row["file"],
        line=row["line"],
        classes=None if row["classes"] is None else tuple(row["classes"]),
    )


def record_text(record: Record) -> str:
    """A record as text, where a column must hold one."""
    objects = [[obj.desc, obj.kind, obj.bins] for obj in record.objects]
    return json.dumps({**vars(record), "objects": objects}, ensure_ascii=False)


def record_from_text(text: str) -> Record:
    """The record that `record_text` wrote."""
    fields = json.loads(text)
    objects = tuple(BoxObject(desc, kind, tuple(bins)) for desc, kind, bins in fields["objects"])
    classes = fields.get("classes")
    return Record(
        **{
            **fields,
            "images": tuple(fields["images"]),
            "objects": objects,
            "classes": None if classes is None else tuple(classes),
        }
    )


def _json_bytes(desc: str) -> int:
    return len(json.dumps(desc, ensure_ascii=False).encode())
