"""Scored runs of random scenes, as `coordexp score` leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coordexp.eval.predictions.artifacts import RUN_META, SCORED, TOKEN_TRACE
from coordexp.files import write_json, write_jsonl

CLASSES = ("cat", "dog", "bird")


def make_run(
    folder: Path, *, seed: int, noise: float, num_images: int = 12, data: Path | None = None
) -> Path:
    """A scored run of random scenes. The scenes depend on the image only, the predictions on `seed` and `noise`."""
    lines, traces = [], []
    for image_id in range(num_images):
        scene, answer = np.random.default_rng(image_id), np.random.default_rng([seed, image_id])
        gt, pred = [], []
        for _ in range(int(scene.integers(0, 5))):
            x, y, side = scene.uniform(0, 200), scene.uniform(0, 200), scene.uniform(10, 120)
            desc = CLASSES[scene.integers(3)]
            gt.append({"type": "bbox_2d", "points": [x, y, x + side, y + side], "desc": desc})
            if answer.random() < 0.85:
                box = np.array([x, y, x + side, y + side]) + answer.normal(0, noise * side, 4)
                box = [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]
                named = desc if answer.random() < 0.9 else "zebra"
                pred.append({"type": "bbox_2d", "points": [float(v) for v in box], "desc": named})
        for obj in pred:
            obj["score"] = float(np.round(answer.uniform(0.05, 1), 1))  # ties
        errors = {"wrong_arity": image_id % 3} if image_id % 3 else {}
        lines.append(
            {
                "image_id": image_id, "image": f"{image_id}.png", "width": 320, "height": 320,
                "coord_mode": "pixel", "gt": gt, "pred": pred, "errors": errors,
                "pred_score_source": "test", "pred_score_version": 1,
            }
        )  # fmt: skip
        text = f'{{"objects": []}} <b>{image_id}</b>'
        traces.append(
            {
                "image_id": image_id,
                "text": text,
                "generated_token_text": ["a"] * (image_id + 1),
                "seconds": 0.5,
            }
        )
    folder.mkdir(parents=True)
    write_jsonl(folder / SCORED, lines)
    write_jsonl(folder / TOKEN_TRACE, traces)
    if data is not None:
        meta = {
            "model": "m",
            "data": str(data / "val.jsonl"),
            "backend": "hf",
            "decoding": {"max_new_tokens": 9},
        }
        write_json(folder / RUN_META, meta)
    return folder
