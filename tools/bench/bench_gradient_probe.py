"""What a probed step costs: forward and backward of stage 1 with all terms, with the gradient probe over without it.

    python tools/bench/bench_gradient_probe.py
    python tools/bench/bench_gradient_probe.py --preset real-vocab --batch 4 --head fused --rounds 5

A tiny model, random text with coordinate tokens, five terms in the loss. Steps with and without the probe alternate;
the ratio is the median over rounds, of CPU time, which a busy neighbour disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.head.run import RowsHead
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, atom_losses, atom_names, combine, stage1_terms
from coordexp.models.tiny import build_tiny_model
from coordexp.trainers.step.gradient_probe import GradientProbe

WEIGHTS = Stage1Weights(soft_ce_weight=1.0, w1_weight=1.0, ce_weight=1.0, gate_weight=1.0)


class Bench:
    """Steps of a tiny model on one batch of random tokens."""

    def __init__(self, folder: Path, preset: str, head: str, batch: int, length: int) -> None:
        build_tiny_model(folder, preset=preset, seed=0)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).train()
        vocab = CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(folder))
        self.columns = CoordColumns(vocab.ids)
        g = torch.Generator().manual_seed(0)
        self.ids_BT = torch.randint(40, 400, (batch, length), generator=g)
        coord_ids = torch.tensor(vocab.ids)
        for first in range(12, length - 4, 16):
            places = torch.randint(0, len(coord_ids), (batch, 4), generator=g)
            self.ids_BT[:, first : first + 4] = coord_ids[places]
        self.rows = SupervisedRows.from_labels(self.ids_BT, self.columns)
        self.head = RowsHead(head, self.columns)
        self.counts = (self.rows.num_text, self.rows.num_coord)
        self.probe = GradientProbe(1, self.columns, torch.device("cpu"), lambda numbers: None)

    def step(self, *, probed: bool) -> float:
        """CPU seconds of a forward and backward."""
        started = time.process_time()
        losses = partial(atom_losses, weights=WEIGHTS, text_count=self.counts[0], coord_count=self.counts[1])
        look = None
        if probed:
            look = self.probe.watch(0, atom_names(WEIGHTS), self.rows, WEIGHTS.needs(), losses)
        inputs = {"input_ids": self.ids_BT}
        loss, _ = self.head(
            self.model, self.model, inputs, self.rows, WEIGHTS.needs(), self._objective, probe=look
        )
        loss.backward()
        self.probe.on_step_end(None, None, None)
        self.model.zero_grad()
        return time.process_time() - started

    def _objective(self, inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, WEIGHTS)
        return combine(terms, *self.counts), terms.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", help="tiny model: demo, nano or real-vocab")
    parser.add_argument("--head", default="auto", choices=("auto", "plain", "fused"))
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "model", args.preset, args.head, args.batch, args.length)
        bench.step(probed=True)
        spent = [(bench.step(probed=False), bench.step(probed=True)) for _ in range(args.rounds)]
    ratio = statistics.median(with_probe / alone for alone, with_probe in spent)
    print(f"{args.preset}, head {args.head}: {bench.rows.num_rows} rows")
    print(f"  without  {1e3 * statistics.median(alone for alone, _ in spent):8.1f} ms CPU")
    print(f"  probed   {1e3 * statistics.median(probed for _, probed in spent):8.1f} ms CPU")
    print(f"  ratio {ratio:.2f}; every 50 steps: {1 + (ratio - 1) / 50:.3f} of a run without it")


if __name__ == "__main__":
    main()
