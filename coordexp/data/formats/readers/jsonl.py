"""The package's own JSONL, as the checks and the exports take it: pixels and rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coordexp.codec.records import Record, parse_record
from coordexp.codec.schema import KIND_POLY
from coordexp.data.check.source import Source
from coordexp.data.formats.readers.builder import DatasetBuilder, Faults
from coordexp.errors import RecordError
from coordexp.eval.predictions.image_result import to_pixels
from coordexp.geometry import polygon_box


def read_data_file(path: Path, faults: Faults) -> Source:
    """A data file with its boxes and outlines in pixels; pictures are the first of every record.

    Raises RecordError naming file and line (or hands it to `faults`).
    """
    builder, pictures = DatasetBuilder(": object "), []
    for record in _records(path, faults):
        width, height = record.width, record.height
        try:
            row = builder.add_image(_name(record), width, height, file=f"{path}:{record.line}")
        except RecordError as error:
            faults.add(str(error))
            continue
        pictures.append(record.image_paths()[0])
        for number, obj in enumerate(record.objects):
            points = to_pixels(obj, width, height)
            if obj.kind == KIND_POLY:
                builder.add_object(row, obj.desc, polygon_box(points).tolist(), number, outlines=[points])
            else:
                builder.add_object(row, obj.desc, points, number)
    if not pictures and not faults.messages:
        raise RecordError(f"{path}: holds no record")
    return Source(path, "jsonl", builder.build(), pictures, faults=faults.messages)


def _name(record: Record) -> str:
    """What an import kept as the picture's name, else its path."""
    kept = (record.metadata or {}).get("file_name")
    return kept if isinstance(kept, str) and kept else record.images[0]


def _records(path: Path, faults: Faults) -> Iterator[Record]:
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if not raw.strip():
                    continue
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    yield parse_record(text, file=path, line=number)
                except RecordError as error:
                    faults.add(str(error))
                except UnicodeDecodeError as error:
                    faults.add(f"{path}:{number}: is not UTF-8 ({error.reason} at byte {error.start})")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from error
