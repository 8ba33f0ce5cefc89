"""Samples for the page as a run with `custom.augmentation` shows them: changed pictures with their objects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from coordexp.codec.records import Record, parse_line
from coordexp.codec.schema import KIND_POLY
from coordexp.data.augment.augmenter import Augmented, Augmenter
from coordexp.data.check.samples import MAX_OBJECTS, DrawnShape, Sample, card, drawn_shape
from coordexp.data.check.source import Source
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.image_result import to_pixels
from coordexp.geometry import polygon_box


def augmented_samples(source: Source, augmenter: Augmenter, count: int, seed: int = 0) -> list[Sample]:
    """Up to `count` samples of a data file, drawn by `seed`, as training shows them from its beginning to its end.

    A record is shown first as in the first epoch; where there are fewer records than samples, again as in the next.
    Records that cannot be read or changed are passed over. Raises ConfigError for a source that is no JSONL of ours.
    """
    if source.kind != "jsonl":
        raise ConfigError(
            f"{source.path} is {source.kind}: --augment shows what training reads, our JSONL. Make it with "
            "`coordexp data convert`."
        )
    records = _drawn(source.path, count, random.Random(seed))
    rows = {name: row for row, name in enumerate(source.dataset.category_names)}
    samples: list[Sample] = []
    for number in range(count if records else 0):
        epoch, at = divmod(number, len(records))
        progress = number / count
        try:
            augmented = augmenter(records[at], turn=f"{epoch}.0", progress=progress)
        except RecordError:
            continue
        title = f"{records[at].images[0]}, line {records[at].line}"
        badges = [f"epoch {epoch + 1}", f"{100 * progress:.0f} % of the run"]
        objects = augmented.record.objects
        shapes = _shapes(augmented, rows)
        samples.append(card(title, augmented.picture, shapes, badges, num_hidden=len(objects) - len(shapes)))
    return samples


def _drawn(path: Path, count: int, rng: random.Random) -> list[Record]:
    """Up to `count` records of a file, drawn evenly; only they are kept."""
    kept: list[tuple[int, bytes]] = []
    with path.open("rb") as lines:
        filled = ((number, raw) for number, raw in enumerate(lines, start=1) if raw.strip())
        for seen, entry in enumerate(filled):
            if seen < count:
                kept.append(entry)
            elif (place := rng.randrange(seen + 1)) < count:
                kept[place] = entry
    records = []
    for number, raw in kept:
        try:
            record = parse_line(raw, file=str(path), line=number)
        except RecordError:
            continue
        if record is not None:
            records.append(record)
    return records


def _shapes(augmented: Augmented, rows: dict[str, int]) -> Sequence[DrawnShape]:
    record = augmented.record
    shapes = []
    for obj in record.objects[:MAX_OBJECTS]:
        points = to_pixels(obj, record.width, record.height)
        is_outline = obj.kind == KIND_POLY
        box = polygon_box(points).tolist() if is_outline else points
        pairs = zip(points[::2], points[1::2], strict=True)
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs) if is_outline else None
        number = rows.get(obj.desc, len(rows))
        shapes.append(drawn_shape(obj.desc, box, outline, number=number, picture_width=record.width))
    return shapes
