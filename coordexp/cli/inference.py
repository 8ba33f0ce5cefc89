"""Inference over a JSONL file, shared by `coordexp infer` and `coordexp demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.records import read_jsonl
from coordexp.config import DEFAULT_PROMPT
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
    prompt: str | None = None,
    field_order: str = "desc_first",
    on_images: Callable[[int, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Greedy predictions of `model` on the records of `data`; bad data is refused before the model is loaded.

    on_images: called with (images just done, images in all).
    """
    records = read_jsonl(data, require_images=True)[:limit]
    requests = []
    for record in records:
        question = conversation(record, prompt=prompt or DEFAULT_PROMPT)
        requests.append(RolloutRequest(tuple(question["messages"]), tuple(question["images"])))
    from coordexp.swift_bridge.engine import load_engine, quiet

    quiet()
    engine = load_engine(model, max_batch_size=batch_size)
    tokenizer = engine.template.tokenizer
    CoordVocab.from_tokenizer(tokenizer)
    backend = HfBackend(engine, max_new_tokens=max_new_tokens, batch_size=batch_size)
    total = len(records)
    return predict(
        records, requests, backend, tokenizer, output, field_order=field_order, chunk_size=batch_size,
        on_images=None if on_images is None else lambda done: on_images(done, total),
    )  # fmt: skip
