"""One answer of a tiny random model: python -m coordexp.machine.tiny_answer BACKEND FOLDER TOLD.json

Builds the model in FOLDER, asks it about a picture, and writes tokens, seconds and device to TOLD.json.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from coordexp.files import write_json
from coordexp.inference.asking import asking
from coordexp.inference.infer import load_backend
from coordexp.inference.settings import InferSettings
from coordexp.models.tiny import build_tiny_model
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.types import RolloutRequest

NUM_TOKENS = 12
_MAX_MODEL_LEN = 512
_SHARE_OF_MEMORY = 0.3
"""Of the device, for vLLM: others may be on it."""


def answer(backend_name: str, folder: Path) -> tuple[tuple[int, ...], float]:
    """Ids of the answer, and the seconds of generating alone."""
    model, picture = folder / "model", folder / "picture.png"
    build_tiny_model(model, preset="nano", seed=0)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    request = RolloutRequest(({"role": "user", "content": "<image>Locate every object."},), (str(picture),))
    with closing(_backend(backend_name, model)) as backend:
        started = time.perf_counter()
        rollout = backend.generate([request])[0]
        return rollout.response_token_ids, time.perf_counter() - started


def _backend(name: str, model: Path) -> RolloutBackend:
    settings = InferSettings(backend=name, batch_size=1, max_new_tokens=NUM_TOKENS, torch_dtype="float32")
    if name == "hf":
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
