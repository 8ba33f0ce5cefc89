"""What rollouts and weights cost beside a training step, on a device; needs neither ms-swift nor vLLM.

    python tools/bench/bench_device.py                      # CUDA, bfloat16, a model of Qwen3-VL-2B's size, T 12,288
    python tools/bench/bench_device.py --device cpu --small

    step     forward, fused head, backward and AdamW on one pack of T tokens, random weights; beside it parsing and
             matching as many answers of 20 boxes as T tokens hold
    readout  the processor that writes coordinates at the median, 32 rows of 152,704 scores, beside their arg-max
    push     reading the weights as they are pushed to an engine, with their checksums, beside a copy on the device

Medians of 3 repeats after a warm-up. A part whose packages are not installed is left out by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

REPEATS = 3
BOXES = 20
Row = dict[str, Any]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median wall time of a call, the device's work included."""
    call()
    found = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Trained:
    """A model with random weights, its tokenizer, and one step of training on a pack of `length` tokens."""

    def __init__(self, device: torch.device, *, small: bool) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        from coordexp.codec.coord_vocab import CoordVocab
        from coordexp.head.run import RowsHead
        from coordexp.losses.columns import CoordColumns
        from coordexp.losses.inputs import SupervisedRows
        from coordexp.losses.stage1 import Stage1Weights
        from coordexp.models.tiny import PRESETS, tiny_config
        from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

        self.device, self.length = device, 192 if small else 12_288
        self.dtype = torch.float32 if small else torch.bfloat16
        self.tok = train_tiny_tokenizer()
        self.tok.model_max_length = 10**9
        size = PRESETS["nano"]
        if not small:
            size = replace(
                size, text_hidden=2048, text_intermediate=6144, text_layers=28, text_heads=16, text_kv_heads=8,
                text_head_dim=128, min_vocab_rows=151_936, max_positions=32_768,
            )  # fmt: skip
        config = tiny_config(size, self.tok)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(0)
        try:
            with torch.device(device):
                self.model = Qwen3VLForConditionalGeneration(config).train()
        finally:
            torch.set_default_dtype(before)
        self.model.gradient_checkpointing_enable()
        self.columns = CoordColumns(CoordVocab.from_tokenizer(self.tok).ids)
        self.weights = Stage1Weights(ce_weight=1.0, gate_weight=1.0)
        self.head = RowsHead("auto", self.columns)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=device.type == "cuda")
        g = torch.Generator().manual_seed(0)
        ids_T = torch.randint(40, 400, (self.length,), generator=g)
        coord_T = torch.rand(self.length, generator=g) < 0.12
        ids_T[coord_T] = self.columns.ids[0] + torch.randint(0, 1000, (int(coord_T.sum()),), generator=g)
        labels_T = torch.where((torch.rand(self.length, generator=g) < 0.3) | coord_T, ids_T, -100)
        self.ids_BT = ids_T.unsqueeze(0).to(device)
        self.rows = SupervisedRows.from_labels(labels_T.unsqueeze(0).to(device), self.columns)

    def step(self) -> float:
        """The loss, of one optimizer step."""
        from coordexp.losses.stage1 import combine, stage1_terms

        def objective(inputs: Any) -> Any:
            terms = stage1_terms(inputs, self.weights)
            return combine(terms, self.rows.num_text, self.rows.num_coord), terms.detach()

        loss, _ = self.head(
            self.model, self.model, {"input_ids": self.ids_BT}, self.rows, self.weights.needs(), objective
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def answers_beside_a_step(trained: Trained) -> list[Row]:
    """Parsing and matching of the answers of a pack, and the step they are beside."""
    from bench_matching import scene

    from coordexp.codec.parse import parse_rollout
    from coordexp.codec.serialize import serialize
    from coordexp.matching import match_objects

    preds, gts = scene(BOXES, (20, 300), 0.0)
    ids = trained.tok.encode(serialize(preds) + "<|im_end|>", add_special_tokens=False)
    number = max(1, trained.length // len(ids))

    def parse_and_match() -> None:
        for _ in range(number):
            parsed = parse_rollout(ids, trained.tok)
            if len(match_objects(parsed.objects, gts).matched) == 0:
                raise AssertionError("nothing matched")

    step, beside = seconds(trained.step, trained.device), seconds(parse_and_match, torch.device("cpu"))
    parameters = sum(p.numel() for p in trained.model.parameters())
    what = f"parse and match {number} answers of {BOXES} boxes ({len(ids)} tokens each)"
    against = f"training step of {parameters / 1e9:.2f}B parameters, T {trained.length}"
    return [row(what, against, f"{1e3 * beside:.1f} ms", f"{1e3 * step:.0f} ms", time=beside / step)]


def weights_read(trained: Trained) -> list[Row]:
    """A pass over all weights with checksums, and a copy of them."""
    from coordexp.rollout.weights.sync import PushedWeights, policy_tensors

    tensors = [tensor for _, tensor in policy_tensors(trained.model)]
    gigabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9

    def read() -> None:
        weights = PushedWeights(policy_tensors(trained.model), trained.dtype)
        for _ in weights:
            pass
        weights.checksums()

    def copy() -> None:
        for tensor in tensors:
            tensor.clone()

    ours, plain = (seconds(call, trained.device) / gigabytes for call in (read, copy))
    what = f"weights read for a push, with checksums ({gigabytes:.3g} GB)"
    return [row(what, "copied on the device", f"{ours:.4f} s/GB", f"{plain:.4f} s/GB", time=ours / plain)]


def readout(device: torch.device, *, small: bool) -> list[Row]:
    """One step of decoding with and without the processor."""
    from coordexp.rollout.decoding.readout import CoordReadout

    rows, vocab = (4, 2500) if small else (32, 152_704)
    scores_BV = torch.randn(rows, vocab, device=device)
    scores_BV[::2, vocab - 1000 :] += 20.0
    processor = CoordReadout("median", range(vocab - 1000, vocab))
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    times = 20

    def plain() -> None:
        for _ in range(times):
            scores_BV.clone().argmax(-1)

    def median() -> None:
        for _ in range(times):
            processor(ids, scores_BV.clone()).argmax(-1)

    ours, theirs = (seconds(call, device) / times for call in (median, plain))
    what = f"median of {rows} rows of {vocab} scores"
    return [row(what, "their arg-max", f"{1e3 * ours:.3f} ms", f"{1e3 * theirs:.3f} ms", time=ours / theirs)]


def row(what: str, against: str, found: str, baseline: str, **ratios: float) -> Row:
    """One comparison. ratios: what of it -> ours over the baseline's."""
    return {"what": what, "against": against, "found": found, "baseline": baseline, "ratios": ratios}


def measured(part: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a part; the reason instead where it cannot be measured here."""
    try:
        return part()
    except ModuleNotFoundError as error:
        return [{"left_out": f"needs {error.name}"}]
    except torch.OutOfMemoryError as error:
        return [{"left_out": f"out of memory: {str(error).splitlines()[0]}"}]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = measured(partial(readout, device, small=args.small))
    try:
        trained = Trained(device, small=args.small)
    except ModuleNotFoundError as error:
        rows.append({"left_out": f"step and push: needs {error.name}"})
    else:
        for part in (answers_beside_a_step, weights_read):
            rows += measured(partial(part, trained))
    for each in rows:
        print(json.dumps(each))
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
