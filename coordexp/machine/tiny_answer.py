"""One answer of a tiny random model: python -m coordexp.machine.tiny_answer BACKEND FOLDER TOLD.json

Builds the model in FOLDER, asks it about a picture, and writes tokens, seconds and device to TOLD.json. BACKEND is
`hf`, `vllm`, or `transformers`: its generate alone, where what our backends need is not installed.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from coordexp.files import write_json
from coordexp.models.tiny import build_tiny_model

if TYPE_CHECKING:
    from coordexp.rollout.backend import RolloutBackend

NUM_TOKENS = 12
_MAX_MODEL_LEN = 512
_SHARE_OF_MEMORY = 0.3
"""Of the device, for vLLM: others may be on it."""


def answer(backend_name: str, folder: Path) -> tuple[tuple[int, ...], float]:
    """Ids of the answer, and the seconds of generating alone."""
    model, picture = folder / "model", folder / "picture.png"
    build_tiny_model(model, preset="nano", seed=0)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    if backend_name == "transformers":
        return _by_transformers(model, picture)
    from coordexp.rollout.types import RolloutRequest

    request = RolloutRequest(({"role": "user", "content": "<image>Locate every object."},), (str(picture),))
    with closing(_backend(backend_name, model)) as backend:
        started = time.perf_counter()
        rollout = backend.generate([request])[0]
        return rollout.response_token_ids, time.perf_counter() - started


def _by_transformers(model: Path, picture: Path) -> tuple[tuple[int, ...], float]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(model)
    loaded.to(device).eval()
    processor = AutoProcessor.from_pretrained(model)
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": Image.open(picture)},
        {"type": "text", "text": "Locate every object."},
    ]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(device)  # fmt: skip
    started = time.perf_counter()
    ids = loaded.generate(**asked, do_sample=False, max_new_tokens=NUM_TOKENS)
    return tuple(ids[0, asked["input_ids"].shape[1] :].tolist()), time.perf_counter() - started


def _backend(name: str, model: Path) -> RolloutBackend:
    from coordexp.inference.settings import InferSettings

    settings = InferSettings(backend=name, batch_size=1, max_new_tokens=NUM_TOKENS, torch_dtype="float32")
    if name == "hf":
        from coordexp.inference.asking import asking
        from coordexp.inference.infer import load_backend

        return load_backend(model, settings, asking(model, {}, flags={}))[0]
    from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend
    from coordexp.swift_bridge.checkpoint import load_template

    return VllmOfflineBackend(
        settings.decoding,
        model,
        load_template(model),
        dtype=torch.float32,
        max_model_len=_MAX_MODEL_LEN,
        gpu_memory_utilization=_SHARE_OF_MEMORY,
    )


if __name__ == "__main__":
    tokens, seconds = answer(sys.argv[1], Path(sys.argv[2]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    write_json(sys.argv[3], {"tokens": list(tokens), "seconds": seconds, "device": device})
