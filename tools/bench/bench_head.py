"""Time and memory of the head and its objective, forward and backward: usual way, plain rows, fused.

    python tools/bench/bench_head.py                       # H 1024, V 152,681, T 2048 and a table over T
    python tools/bench/bench_head.py --lengths 2048        # without the table
    python tools/bench/bench_head.py --device cuda --dtype bfloat16 --hidden 2048 --lengths 12288

One pack of T tokens of which 40 % are supervised, 30 % of those coordinate tokens; stage-1 objective with the
mix ce + soft_ce + w1 + gate.

    usual   logits of all T rows, transformers' causal-LM loss on text, coordinate terms on the full logits
    plain   logits of the supervised rows only, our atoms, autograd
    fused   our atoms, chunk by chunk, gradients taken in the forward
    liger   the fused head with liger-kernel's text rows (CUDA, with liger-kernel installed; skipped elsewhere)

Every measurement runs in a fresh process. Memory is the growth of the peak (resident set, or allocated device
memory) over hidden states and head weight; the weight's own gradient is not counted. On the CPU choose the
threads with OMP_NUM_THREADS. A busy neighbour shows in the wall time more than in the CPU time.
Exit status 1 if fused misses its bounds at T = 2048 (CPU only, wall time).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.head.liger import liger_kernel
from coordexp.head.projection import HeadProjection
from coordexp.head.run import apply_head
from coordexp.losses.columns import CoordColumns
from coordexp.losses.coord import gaussian_targets
from coordexp.losses.inputs import IGNORE_INDEX, LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

MODES = ("usual", "plain", "fused", "liger")
NUM_BINS = 1000
SUPERVISED, COORD = 0.4, 0.3
WEIGHTS = Stage1Weights(ce_weight=1.0, gate_weight=1.0)
BOUNDS = {"usual": (0.4, 1 / 20), "plain": (1.05, 1 / 6)}
"""At T = 2048: fused over this mode, largest time ratio and largest memory ratio."""


@dataclass(frozen=True)
class Case:
    mode: str
    length: int
    hidden: int
    vocab: int
    device: str
    dtype: str
    repeats: int


@dataclass(frozen=True)
class Result:
    seconds: float
    cpu_seconds: float
    growth_mb: float
    loss: float
    weight_grad_norm: float


@dataclass(frozen=True)
class Batch:
    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    columns: CoordColumns


def make_batch(case: Case) -> Batch:
    """Random hidden states and head, and labels whose coordinate ids end the vocabulary."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    g = torch.Generator().manual_seed(0)
    columns = CoordColumns(range(case.vocab - NUM_BINS, case.vocab))
    labels_T = torch.full((case.length,), IGNORE_INDEX)
    supervised = torch.randperm(case.length - 1, generator=g)[: int(SUPERVISED * case.length)] + 1
    coord = supervised[: int(COORD * supervised.numel())]
    labels_T[supervised] = torch.randint(case.vocab - NUM_BINS, supervised.shape, generator=g)
    labels_T[coord] = torch.randint(case.vocab - NUM_BINS, case.vocab, coord.shape, generator=g)
    hidden_TH = torch.randn(case.length, case.hidden, generator=g)
    weight_VH = torch.randn(case.vocab, case.hidden, generator=g).mul_(case.hidden**-0.5)
    hidden_TH, weight_VH = (x.to(device, dtype).requires_grad_() for x in (hidden_TH, weight_VH))
    return Batch(hidden_TH, weight_VH, labels_T.to(device), columns)


def usual_loss(batch: Batch) -> Tensor:
    """What a trainer does that takes `model(...).logits` and adds coordinate losses to it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits_TV = F.linear(batch.hidden_TH, batch.weight_VH)
    shifted_T = F.pad(batch.labels_T[1:], (0, 1), value=IGNORE_INDEX)
    bins_T = batch.columns.bins(shifted_T)
    is_coord_T = bins_T >= 0
    text_labels_T = shifted_T.masked_fill(is_coord_T, IGNORE_INDEX)
    text = ForCausalLMLoss(
        logits_TV.unsqueeze(0), None, logits_TV.shape[-1], shift_labels=text_labels_T.unsqueeze(0)
    )

    full_NV, bins_N = logits_TV[is_coord_T].float(), bins_T[is_coord_T]
    coord_NK = full_NV[:, list(batch.columns.ids)]
    log_probs_NK = coord_NK.log_softmax(-1)
    target_NK = gaussian_targets(bins_N, NUM_BINS, WEIGHTS.target_sigma)
    soft_ce = -(target_NK * log_probs_NK).sum(-1)
    w1 = (log_probs_NK.exp().cumsum(-1) - target_NK.cumsum(-1)).abs().sum(-1) / (NUM_BINS - 1)
    ce = F.cross_entropy(coord_NK, bins_N, reduction="none")
    gate = full_NV.logsumexp(-1) - coord_NK.logsumexp(-1)
    return text + (soft_ce + w1 + ce + gate).mean()


def rows_loss(batch: Batch, mode: str) -> Tensor:
    """Our objective on supervised rows, through the plain or the fused head, with liger-kernel or without."""
    rows = SupervisedRows.from_labels(batch.labels_T.unsqueeze(0), batch.columns)
    projection = HeadProjection(batch.hidden_TH[rows.positions_R], batch.weight_VH)

    def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, WEIGHTS)
        return combine(terms, rows.num_text, rows.num_coord), terms.detach()

    loss, _ = apply_head(
        projection, rows, batch.columns, WEIGHTS.needs(), objective, mode="fused" if mode == "liger" else mode,
        liger=mode == "liger",
    )  # fmt: skip
    return loss


def measure(case: Case) -> Result:
    """Best time of the repeats, peak growth of the first."""
    warm = make_batch(Case(**{**asdict(case), "length": 64, "vocab": 4096}))
    run_once(warm, case.mode)
    batch = make_batch(case)
    peak = PeakMemory(batch.hidden_TH.device)
    runs = [run_once(batch, case.mode)]
    weight_grad = batch.weight_VH.grad
    assert weight_grad is not None
    growth = peak.growth() - weight_grad.numel() * weight_grad.element_size()
    grad_norm = weight_grad.float().norm().item()
    del weight_grad
    runs += [run_once(batch, case.mode) for _ in range(case.repeats - 1)]
    return Result(
        seconds=min(run[0] for run in runs),
        cpu_seconds=min(run[1] for run in runs),
        growth_mb=growth / 2**20,
        loss=runs[0][2],
        weight_grad_norm=grad_norm,
    )


def run_once(batch: Batch, mode: str) -> tuple[float, float, float]:
    """Wall and CPU seconds of one forward and backward, and the loss."""
    batch.hidden_TH.grad = batch.weight_VH.grad = None
    _synchronize(batch.hidden_TH.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = usual_loss(batch) if mode == "usual" else rows_loss(batch, mode)
    loss.backward()
    _synchronize(batch.hidden_TH.device)
    return time.perf_counter() - start, time.process_time() - cpu_start, loss.item()


class PeakMemory:
    """Peak memory in bytes over what was in use when this was made."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = _status_bytes("VmRSS")

    def growth(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, which is in kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_fresh_process(case: Case) -> Result | str:
    """Measure in a child; a sentence instead where that cannot be done here."""
    if case.mode == "liger" and (case.device != "cuda" or liger_kernel() is None):
        return "skipped: needs a CUDA device and liger-kernel 0.8.5 or later"
    need = estimate_bytes(case)
    available = torch.cuda.mem_get_info()[0] if case.device == "cuda" else _available_bytes()
    if need > 0.9 * available:
        return f"skipped: needs about {need / 2**30:.0f} GiB, {available / 2**30:.0f} GiB free"
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {case} failed:\n{done.stderr}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def estimate_bytes(case: Case) -> float:
    """Rough peak: head and its gradient, and about four float32 copies of the logits that exist at once."""
    rows = {"usual": case.length, "plain": SUPERVISED * case.length, "fused": 0, "liger": 0}[case.mode]
    return 4 * (4 * rows * case.vocab + 3 * case.vocab * case.hidden)


def _available_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:")) * 1024


def report(results: dict[tuple[str, int], Result | str]) -> bool:
    """Print the table and the bounds; True if they hold (or T = 2048 was not measured)."""
    print(
        f"{'T':>7} {'mode':<6} {'seconds':>8} {'CPU s':>8} {'peak growth MB':>15} {'loss':>10} {'|dW|':>10}"
    )
    for (mode, length), result in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        if isinstance(result, str):
            print(f"{length:>7} {mode:<6} {result}")
        else:
            print(
                f"{length:>7} {mode:<6} {result.seconds:>8.3f} {result.cpu_seconds:>8.3f} "
                f"{result.growth_mb:>15.0f} {result.loss:>10.5f} {result.weight_grad_norm:>10.6f}"
            )
    verdicts = []
    for other, (time_bound, memory_bound) in BOUNDS.items():
        ours, theirs = results.get(("fused", 2048)), results.get((other, 2048))
        if isinstance(ours, Result) and isinstance(theirs, Result):
            time_ratio, memory_ratio = ours.seconds / theirs.seconds, ours.growth_mb / theirs.growth_mb
            cpu_ratio = ours.cpu_seconds / theirs.cpu_seconds
            fast, small = time_ratio <= time_bound, memory_ratio <= memory_bound
            verdicts += [fast, small]
            print(
                f"fused / {other} at T = 2048: time {time_ratio:.3f} (bound {time_bound}, "
                f"{'ok' if fast else 'MISSED'}; CPU time {cpu_ratio:.3f}), memory {memory_ratio:.4f} "
                f"(bound {memory_bound:.4f}, {'ok' if small else 'MISSED'})"
            )
    return all(verdicts)


def json_rows(results: dict[tuple[str, int], Result | str]) -> list[dict[str, object]]:
    """Each mode beside `usual`, as tools/bench/gpu.py puts it into a table."""
    rows: list[dict[str, object]] = []
    for (mode, length), result in results.items():
        usual = results.get(("usual", length))
        if isinstance(result, str):
            rows.append({"left_out": f"{mode}: {result.removeprefix('skipped: ')}"})
        elif mode != "usual":
            row: dict[str, object] = {
                "what": f"{mode}, T {length}", "found": _shown(result), "against": "usual",
                "baseline": usual if isinstance(usual, str) else "not measured", "ratios": {},
            }  # fmt: skip
            if isinstance(usual, Result):
                ratios = {
                    "time": result.seconds / usual.seconds,
                    "memory": result.growth_mb / usual.growth_mb,
                }
                row |= {"baseline": _shown(usual), "ratios": ratios}
            rows.append(row)
    return rows


def _shown(result: Result) -> str:
    return f"{1e3 * result.seconds:.1f} ms, {result.growth_mb:.0f} MiB"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 1024, 4096, 8192], metavar="T")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=152_681)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="also write the comparisons there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(asdict(measure(Case(**json.loads(args.child))))))
        return 0

    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{where}; {args.dtype}, H {args.hidden}, V {args.vocab}; torch {torch.__version__}", flush=True)
    results = {}
    for length in args.lengths:
        for mode in args.modes:
            case = Case(mode, length, args.hidden, args.vocab, args.device, args.dtype, args.repeats)
            results[mode, length] = in_fresh_process(case)
    if args.json:
        Path(args.json).write_text(json.dumps(json_rows(results)))
    return 0 if report(results) or args.device == "cuda" else 1


if __name__ == "__main__":
    sys.exit(main())
