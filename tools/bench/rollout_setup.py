"""What the benches of rollouts share: their arguments, the policy, and the questions it answers."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coordexp.codec.forms.base import AnswerForm
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.data.shapes import PRESETS as SCENES
from coordexp.data.shapes import generate_shapes
from coordexp.models.tiny import build_tiny_model
from coordexp.rollout.session.build import build_policy_backend
from coordexp.rollout.types import RolloutRequest

PROMPT = "<image>Find all objects."


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The arguments of every bench. rounds: the default."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--backends", nargs="+", default=["vllm", "hf"], choices=("vllm", "hf"))
    found.add_argument("--model", help="checkpoint folder; without it a random tiny model is made")
    found.add_argument("--data", type=Path, help="JSONL with images; without it scenes are drawn")
    found.add_argument("--preset", default="nano", help="size of the tiny model")
    found.add_argument("--requests", type=int, default=64)
    found.add_argument("--batch-size", type=int, default=16)
    found.add_argument("--max-new-tokens", type=int, default=64)
    found.add_argument("--max-model-len", type=int, default=1024)
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default="float32")
    found.add_argument("--json", type=Path, help="also write the comparisons there")
    return found


def settings(args: argparse.Namespace, backend: str, **more: Any) -> RolloutMatching:
    """Of a backend. more: further settings of `rollout_matching`."""
    vllm = {
        "max_model_len": args.max_model_len, "max_num_seqs": args.batch_size, "enforce_eager": args.device == "cpu",
    }  # fmt: skip
    return RolloutMatching(
        backend=backend,
        decode_batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        vllm=vllm,
        **more,
    )


@dataclass(frozen=True)
class Setup:
    """The policy as a trainer holds it, and what it is asked."""

    model: Any
    template: Any
    model_dir: str
    dtype: torch.dtype
    requests: list[RolloutRequest]

    @contextmanager
    def backend(self, chosen: RolloutMatching, form: AnswerForm | None = None) -> Iterator[Any]:
        """A backend that has the policy's weights. form: of its answers."""
        backend: Any = build_policy_backend(
            chosen,
            model=self.model,
            template=self.template,
            model_dir=self.model_dir,
            torch_dtype=self.dtype,
            form=form,
        )
        backend.push_policy(1)
        yield backend
        backend.close()


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Setup]:
    """The policy and the questions that the arguments name, made where they name none."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = args.model or f"{scratch}/model"
        data = args.data or Path(scratch) / "scenes" / "val.jsonl"
        if args.model is None:
            build_tiny_model(model_dir, preset=args.preset)
        if args.data is None:
            generate_shapes(data.parent, SCENES["demo"], num_train=0, num_val=args.requests)
        dtype = getattr(torch, args.dtype)
        model, template = _policy(model_dir, dtype, args.device)
        yield Setup(model, template, model_dir, dtype, _requests(data, args.requests))


def _policy(model_dir: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from swift.model import get_model_processor
    from swift.template import get_template

    from coordexp.swift_bridge.checkpoint import quiet
    from coordexp.swift_bridge.template import register_coord_template

    quiet()
    register_coord_template()
    model, processor = get_model_processor(
        model_dir, model_type="qwen3_vl", torch_dtype=dtype, attn_impl="sdpa", device_map=device
    )
    return model.train(), get_template(processor, max_length=4096)


def _requests(data: Path, count: int) -> list[RolloutRequest]:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()][:count]
    message = {"role": "user", "content": PROMPT}
    return [
        RolloutRequest((message,), (str(data.parent / row["images"][0]),), seed=index)
        for index, row in enumerate(rows)
    ]
