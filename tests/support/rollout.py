"""A model in training and questions to it, for tests of rollout backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.pictures import PICTURES, write_picture

from coordexp.rollout.types import RolloutRequest


def load_policy(
    model_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> tuple[Any, Any]:
    """Model and template as a trainer holds them, in training mode. device: None leaves it to ms-swift."""
    from swift.model import get_model_processor
    from swift.template import get_template

    from coordexp.swift_bridge.template import register_coord_template

    register_coord_template()
    model, processor = get_model_processor(
        str(model_dir), model_type="qwen3_vl", torch_dtype=dtype, attn_impl="sdpa",
        device_map=None if device is None else str(device),
    )  # fmt: skip
    template = get_template(processor, max_length=1024)
    template.set_mode("train")
    return model.train(), template


def read_requests(scenes: Path) -> list[RolloutRequest]:
    """One question for each record of a JSONL file, of three different lengths, seeded."""
    rows = [json.loads(line) for line in scenes.read_text().splitlines()]
    return [
        RolloutRequest(
            ({"role": "user", "content": "<image>Find" + " all objects" * (index % 3)},),
            (str(scenes.parent / row["images"][0]),),
            seed=1000 + index,
            request_id=f"val:{index}",
        )
        for index, row in enumerate(rows)
    ]


def picture_requests(folder: Path) -> list[RolloutRequest]:
    """One question for each kind of picture file."""
    return [
        RolloutRequest(
            ({"role": "user", "content": "<image>Find all objects"},),
            (str(write_picture(folder, name)),),
            seed=index,
            request_id=name,
        )
        for index, name in enumerate(PICTURES)
    ]
