"""The demo page's pictures: ground truth beside predictions, with what the model wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.eval.detection import match_at_threshold
from coordexp.eval.predictions.artifacts import SCORED, TOKEN_TRACE, read_jsonl_lines
from coordexp.eval.report.pictures import contact_sheet, side_by_side
from coordexp.geometry import pairwise_iou
from coordexp.pictures import open_picture


def gallery(run: Path, data: Path, output: Path, count: int) -> list[dict[str, Any]]:
    """Draw the first `count` images of an evaluated run into `output`; returns entries for the demo page.

    Also writes `output/contact_sheet.png`.
    """
    output.mkdir(parents=True, exist_ok=True)
    lines = read_jsonl_lines(run / SCORED, ("image", "gt", "pred", "errors"))[:count]
    traces = read_jsonl_lines(run / TOKEN_TRACE, ("text",))[:count]
    entries, pictures = [], []
    for line, trace in zip(lines, traces, strict=True):
        picture = _picture(line, data)
        path = output / f"{Path(line['image']).stem}.png"
        picture.save(path)
        pictures.append(picture)
        entries.append(
            {
                "title": line["image"],
                "picture": path,
                "text": trace["text"],
                "status": _status(line),
                "ok": not line["errors"],
            }
        )
    contact_sheet(pictures).save(output / "contact_sheet.png")
    return entries


def _picture(line: dict[str, Any], data: Path) -> Image.Image:
    gt = [(obj["desc"], tuple(obj["points"])) for obj in line["gt"]]
    pred = [(obj["desc"], tuple(obj["points"])) for obj in line["pred"]]
    iou_PG = pairwise_iou([box for _, box in pred], [box for _, box in gt])
    for p, (pred_desc, _) in enumerate(pred):
        for g, (gt_desc, _) in enumerate(gt):
            if pred_desc != gt_desc:
                iou_PG[p, g] = 0.0
    return side_by_side(open_picture(data / line["image"]), gt, pred, match_at_threshold(iou_PG, 0.5))


def _status(line: dict[str, Any]) -> str:
    dropped = ", ".join(f"{reason}: {count}" for reason, count in line["errors"].items())
    count = len(line["pred"])
    return f"parsed, {count} object{'' if count == 1 else 's'}" + (f" ({dropped})" if dropped else "")
