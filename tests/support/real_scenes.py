"""Scenes with descriptions in several scripts, for models on Qwen's own vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from coordexp.data.shapes import PRESETS, generate_shapes, with_overrides

NAMES = ("猫", "naïve 🐱", 'say "hi"', "line\nbreak", "قطة", "red box!")


def real_scenes(folder: Path) -> Path:
    """4 training and 2 validation scenes of 416 x 320 pixels."""
    size = {"width": 416, "height": 320, "max_objects": 3, "min_side": 40, "max_side": 120}
    generate_shapes(folder, with_overrides(PRESETS["pixels"], size), num_train=4, num_val=2, seed=3)
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for number, obj in enumerate(obj for record in records for obj in record["objects"]):
            obj["desc"] = NAMES[number % len(NAMES)]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
    return folder
