"""One answer on the console: what is there on the left, what the model wrote on the right."""

from __future__ import annotations

from itertools import zip_longest

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coordexp.codec.schema import BoxObject
from coordexp.trainers.rollouts.answers import JudgedAnswer

SHOWN_OBJECTS = 8
"""Rows of the table; of more objects the rest is counted."""


def sample_panel(answer: JudgedAnswer, step: int) -> Panel:
    """Objects with their bins; matched pairs stand in one row with their mask IoU, then the missed and the false."""
    preds, gts, match = answer.parsed.objects, answer.raw.objects, answer.match
    pairs = [
        (gts[gt], preds[pred], f"{iou:.2f}")
        for (pred, gt), iou in zip(match.matched, match.maskious, strict=True)
    ]
    missed, false = [gts[i] for i in match.unmatched_gt], [preds[i] for i in match.unmatched_pred]
    table = Table(box=None, pad_edge=False)
    for title in ("ground truth", "answer", "IoU"):
        table.add_column(title, overflow="fold")
    rows = [
        (_shown(gt, "green"), _shown(pred, "green"), Text(iou)) for gt, pred, iou in pairs
    ] + [
        (_shown(gt, "magenta"), _shown(pred, "red"), Text("")) for gt, pred in zip_longest(missed, false)
    ]  # fmt: skip
    for row in rows[:SHOWN_OBJECTS]:
        table.add_row(*row)
    if len(rows) > SHOWN_OBJECTS:
        table.add_row(Text(f"and {len(rows) - SHOWN_OBJECTS} more rows"), Text(""), Text(""))
    found = f"{len(gts)} objects, {len(preds)} predicted, {len(pairs)} matched"
    return Panel(
        table,
        title=Text(f"step {step}: {answer.raw.sample_id}"),
        subtitle=Text(found if answer.rollout.finish_reason == "stop" else f"{found}, cut off"),
        expand=False,
    )


def _shown(item: BoxObject | None, style: str) -> Text:
    return Text("" if item is None else f"{item.desc} {list(item.bins)}", style=style)
