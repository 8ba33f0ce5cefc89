"""One self-contained `index.html` that shows what a run learned: numbers, curves, pictures, raw model text.

Pictures are embedded, styles are inline, nothing is fetched: the file opens from disk and can be moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, cast

from coordexp.errors import ContractError
from coordexp.eval.gallery.thumbnails import data_uri
from coordexp.eval.report.page import format_measure, write_page


class HeadlineRow(TypedDict):
    """One column of the headline table. A number that is absent or None shows as a dash."""

    name: str
    f1_50: NotRequired[float | None]
    f1_mean: NotRequired[float | None]
    precision: NotRequired[float | None]
    recall: NotRequired[float | None]
    map: NotRequired[float | None]
    bin_error: NotRequired[float | None]
    seconds: NotRequired[float | None]


class GalleryItem(TypedDict):
    """One image of the gallery.

    picture: PNG of ground truth beside prediction.  text: what the model wrote, verbatim.
    status: how the parser took it, such as "parsed, 2 objects" or "truncated, 1 dropped (wrong_arity)".
    ok: whether the text parsed without any loss.
    """

    title: str
    picture: Path
    text: str
    status: str
    ok: bool


class PageNotes(TypedDict):
    """Words around the numbers. facts: name -> value, shown as a small table."""

    title: str
    summary: str
    commands: Sequence[str]
    facts: NotRequired[dict[str, str]]


class _Measure(NamedTuple):
    key: str
    title: str
    meaning: str
    decimals: int
    better: str  # "higher", "lower" or "" (no preference)


MEASURES = (
    _Measure("f1_50", "F1 at IoU 0.5", "one-to-one matches of box and description", 3, "higher"),
    _Measure("f1_mean", "F1 at IoU 0.5:0.95", "averaged over ten thresholds", 3, "higher"),
    _Measure("precision", "Precision at IoU 0.5", "matched of all predicted objects", 3, "higher"),
    _Measure("recall", "Recall at IoU 0.5", "matched of all true objects", 3, "higher"),
    _Measure("map", "COCO mAP", "pycocotools, IoU 0.5:0.95", 3, "higher"),
    _Measure("bin_error", "Coordinate error", "bins of 1000, of found boxes", 1, "lower"),
    _Measure("seconds", "Seconds", "wall-clock time", 0, ""),
)
"""The rows of the headline table, in order."""

_HERO_KEYS = ("f1_50", "map", "bin_error")


def write_demo_page(
    out_dir: Path,
    *,
    headline: Sequence[HeadlineRow],
    curves: Sequence[Path],
    gallery: Sequence[GalleryItem],
    notes: PageNotes,
) -> Path:
    """Write `out_dir/index.html` and return its path.

    Args:
        headline: runs to compare, the untrained model first and the run to show off last.
        curves: PNG files of curves.
        gallery: one entry per image, in order.

    Raises:
        ContractError: no headline row, an unknown measure, or a picture that does not exist.
    """
    _check_headline(headline)
    return write_page(
        out_dir / "index.html",
        "demo_page.html.jinja",
        notes=notes,
        facts=notes.get("facts", {}),
        heroes=_heroes(headline),
        runs=[row["name"] for row in headline],
        table=[(measure, _cells(measure, headline)) for measure in MEASURES],
        curves=[(path.stem.replace("_", " "), _data_uri(path)) for path in curves],
        gallery=[{**item, "source": _data_uri(item["picture"])} for item in gallery],
    )


def _check_headline(headline: Sequence[HeadlineRow]) -> None:
    if not headline:
        raise ContractError("demo page: no headline row, expected at least one run")
    known = {"name", *(measure.key for measure in MEASURES)}
    for row in headline:
        unknown = sorted(set(row) - known)
        if unknown or "name" not in row:
            raise ContractError(
                f"demo page: headline row {dict(row)} has {', '.join(unknown) or 'no name'}: "
                f"expected name and any of {', '.join(measure.key for measure in MEASURES)}"
            )


def _cells(measure: _Measure, headline: Sequence[HeadlineRow]) -> list[tuple[str, bool]]:
    """(text, is the best of its row) per run; nothing is best when there is nothing to compare."""
    values = [_value(row, measure) for row in headline]
    present = [value for value in values if value is not None]
    best = None
    if measure.better and len(present) > 1:
        best = max(present) if measure.better == "higher" else min(present)
    return [
        (format_measure(value, measure.decimals), value is not None and value == best) for value in values
    ]


def _heroes(headline: Sequence[HeadlineRow]) -> list[tuple[str, str, str]]:
    """(title, before, after) of the main measures, first run against last."""
    if len(headline) < 2:
        return []
    first, last = headline[0], headline[-1]
    return [
        (m.title, format_measure(_value(first, m), m.decimals), format_measure(_value(last, m), m.decimals))
        for m in MEASURES
        if m.key in _HERO_KEYS and _value(last, m) is not None
    ]


def _value(row: HeadlineRow, measure: _Measure) -> float | None:
    return cast("dict[str, float | None]", row).get(measure.key)


def _data_uri(path: Path) -> str:
    if not path.is_file():
        raise ContractError(f"demo page: picture {path} does not exist")
    return data_uri(path.read_bytes(), "image/png")
