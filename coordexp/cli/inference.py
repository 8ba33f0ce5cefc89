"""Inference over a JSONL file, shared by `coordexp infer` and `coordexp demo`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.records import read_jsonl
from coordexp.config.custom import Custom
from coordexp.config.resolved import RESOLVED_FILE
from coordexp.data.dataset import conversation
from coordexp.eval.predict import predict
from coordexp.rollout.hf import HfBackend
from coordexp.rollout.types import RolloutRequest


def infer_file(
    model: Path,
    data: Path,
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 1024,
    torch_dtype: str = "float32",
    prompt: str | None = None,
    field_order: str | None = None,
    on_images: Callable[[int, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Greedy predictions of `model` on the records of `data`; bad data is refused before the model is loaded.

    prompt, field_order: None takes what the run of the checkpoint was trained with.
    on_images: called with (images just done, images in all).
    """
    custom = trained_with(model)
    prompt, field_order = prompt or custom.prompt, field_order or custom.object_field_order
    records = read_jsonl(data, require_images=True)[:limit]
    requests = []
    for record in records:
        question = conversation(record, prompt=prompt)
        requests.append(RolloutRequest(tuple(question["messages"]), tuple(question["images"])))
    import torch

    from coordexp.swift_bridge.engine import load_engine, quiet

    quiet()
    engine = load_engine(model, max_batch_size=batch_size, torch_dtype=getattr(torch, torch_dtype))
    tokenizer = engine.template.tokenizer
    CoordVocab.from_tokenizer(tokenizer)
    backend = HfBackend(engine, max_new_tokens=max_new_tokens, batch_size=batch_size)
    total = len(records)
    return predict(
        records, requests, backend, tokenizer, output, field_order=field_order, chunk_size=batch_size,
        on_images=None if on_images is None else lambda done: on_images(done, total),
    )  # fmt: skip


def trained_with(checkpoint: Path) -> Custom:
    """The `custom` settings of the run that wrote a checkpoint; the defaults where no run stands beside it."""
    resolved = checkpoint.parent / RESOLVED_FILE
    if not resolved.is_file():
        return Custom()
    return Custom.model_validate(json.loads(resolved.read_text(encoding="utf-8"))["custom"])
