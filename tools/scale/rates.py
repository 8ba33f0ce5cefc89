"""What a machine does in a second: the few numbers that predictions rest on, each with its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from coordexp.errors import ConfigError
from coordexp.files import write_text


@dataclass(frozen=True)
class Rates:
    """products, attention: operations a second.  traffic, reduce, push, wake: bytes a second.

    traffic: of kernels that only read and write.  scores: logits a second.  update: bytes a second of the optimizer.
    reduce: of a rank, between the ranks of a node; reduce_nodes: between nodes.  push: weights into an engine,
    checksums included.  wake: an engine's weights from host memory.
    launch_s: of a kernel; decode_launch_s: of one where no graph is kept, as in reading questions and writing answers.
    step_s: of the host in every optimizer step.  sample_s, token_s: of the host for a sample and for each of its
    tokens.  decode_s: of the host for a token of all answers that are written at once.
    judge_token_s: parsing, matching and encoding, for a token of an answer.
    device_beside_host: kernels run while the host goes on; so do data loaders and, where gradients meet, the backward.
    sources: of each number, in words.
    """

    products: float
    attention: float
    traffic: float
    scores: float
    update: float
    launch_s: float = 0.0
    decode_launch_s: float = 0.0
    step_s: float = 0.0
    sample_s: float = 0.0
    token_s: float = 0.0
    decode_s: float = 0.0
    judge_token_s: float = 0.0
    reduce: float = float("inf")
    reduce_nodes: float = float("inf")
    push: float = float("inf")
    wake: float = float("inf")
    device_beside_host: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type == "float" and not (value >= 0 if one.name.endswith("_s") else value > 0):
                raise ConfigError(f"rates: {one.name} is {value}; expected a number above 0.")


def read_rates(path: Path) -> Rates:
    """ConfigError for a file that is missing or holds other keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"rates: {path} cannot be read: {error}") from error
    names = {one.name for one in fields(Rates)}
    if not isinstance(found, dict) or set(found) - names:
        raise ConfigError(f"{path}: expected an object with keys of {', '.join(sorted(names))}.")
    try:
        return Rates(**found)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_rates(path: Path, rates: Rates) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**asdict(rates), "sources": dict(rates.sources)}, indent=1) + "\n")


FLOAT32 = 4


@dataclass(frozen=True)
class Sheet:
    """A GPU's data sheet: dense bfloat16 operations and bytes of memory a second, memory, bytes to its neighbours."""

    name: str
    tflops: float
    bandwidth: float
    memory_gb: float
    link: float


SHEETS = {
    sheet.name: sheet
    for sheet in (
        Sheet("A100", 312.0, 2.04e12, 80.0, 300e9),
        Sheet("H100", 989.0, 3.35e12, 80.0, 450e9),
        Sheet("H200", 989.0, 4.8e12, 141.0, 450e9),
    )
}
NODE_LINK = 50e9
"""400 Gbit/s of a GPU to other nodes."""


def gpu_rates(sheet: Sheet, *, product_share: float = 0.55, byte_share: float = 0.7) -> Rates:
    """A GPU at stated shares of its data sheet; nothing of it is measured."""
    of_peak = f"{product_share:.0%} of {sheet.tflops:.0f} TFLOP/s ({sheet.name} data sheet, dense bfloat16)"
    of_bytes = f"{byte_share:.0%} of {sheet.bandwidth / 1e12:.2f} TB/s ({sheet.name} data sheet)"
    traffic = byte_share * sheet.bandwidth
    return Rates(
        products=product_share * sheet.tflops * 1e12,
        attention=product_share * sheet.tflops * 1e12 / 2,
        traffic=traffic,
        scores=traffic / (8 * FLOAT32),
        update=traffic,
        launch_s=5e-6,
        step_s=0.05,
        sample_s=0.02,
        decode_s=0.003,
        judge_token_s=5e-6,
        reduce=0.6 * sheet.link,
        reduce_nodes=0.6 * NODE_LINK,
        push=20e9,
        wake=20e9,
        device_beside_host=True,
        sources={
            "products": of_peak,
            "attention": f"half of that share of {sheet.tflops:.0f} TFLOP/s",
            "traffic": of_bytes,
            "scores": "the same bytes, eight passes over float32 logits",
            "update": "the same bytes",
            "launch_s": "assumed",
            "decode_launch_s": "none: an engine with captured graphs",
            "step_s": "assumed",
            "sample_s": "assumed, of one data loader worker",
            "decode_s": "assumed, of an engine's scheduler",
            "judge_token_s": "assumed",
            "reduce": f"60% of {sheet.link / 1e9:.0f} GB/s ({sheet.name} data sheet, NVLink in one direction)",
            "reduce_nodes": f"60% of {NODE_LINK / 1e9:.0f} GB/s (a link of 400 Gbit/s for each GPU)",
            "push": "assumed, checksums of both sides included",
            "wake": "assumed, from pinned host memory over PCIe",
        },
    )
