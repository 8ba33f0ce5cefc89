"""What the metrics of stage 1 cost, and what watches them: time of a training step with them over one without.

    python tools/bench/bench_metrics.py
    python tools/bench/bench_metrics.py --rounds 40 --preset nano --head fused

One `swift sft` process with the stage-1 trainer of configs/demo/stage1.yaml, a tiny model and a batch of 8 scenes.
A step is collation, forward, backward, clipping and the optimizer's update; images are encoded beforehand.

    none   the loss alone: no monitors, no observer of logits, no token types, nothing gathered
    all    everything the trainer logs, token types with top-5 and coordinate mass included, clocks of the parts of a
           step and counters, and after every 10 steps what is done at a logging step: reduction, payload,
           metrics.jsonl, TensorBoard
    watched  all, with stats.json after every step, and at a logging step the lines of the console at all levels and
           the rules

A round is 10 steps of each kind; they alternate step by step in changing order and take the same batches, so that a
busy neighbour meets all alike. A ratio is the median over rounds. Wall and CPU time: a busy neighbour shows in the
wall time first. Threads: OMP_NUM_THREADS (1 here if unset). The bounds, 1.03 for all / none and 1.02 for watched / all,
are for the defaults: exit status 1 when a ratio of CPU times is above its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from coordexp.data.shapes import PRESETS, generate_shapes
from coordexp.models.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
KINDS = ("none", "all", "watched")
BOUNDS = {("all", "none"): 1.03, ("watched", "all"): 1.02}
BATCH_SIZE = 8

Seconds = dict[str, list[tuple[float, float]]]
"""Kind -> wall and CPU seconds per step of every round."""


def run_trainer(folder: Path, preset: str, head: str, rounds: int, device: str = "cpu") -> Seconds:
    """Measured inside the trainer's process. device: cuda takes float32 on the first GPU."""
    build_tiny_model(folder / "model", preset=preset, seed=0)
    generate_shapes(folder / "data", PRESETS["demo"], num_train=4 * BATCH_SIZE, num_val=1, seed=0)
    flags = {
        "model": folder / "model",
        "dataset": folder / "data" / "train.jsonl",
        "val_dataset": folder / "data" / "val.jsonl",
        "output_dir": folder / "run",
        "external_plugins": [
            ROOT / "coordexp" / "plugin.py",
            Path(__file__).with_name("bench_metrics_plugin.py"),
        ],
        "callbacks": "measure_metrics",
        "per_device_train_batch_size": BATCH_SIZE,
        "dataloader_num_workers": 0,
        "report_to": "tensorboard",
        "set": [f"custom.head={head}", "custom.token_type_metrics={enabled: true, include: ['*']}"],
    }
    argv = [
        sys.executable,
        "-m",
        "coordexp.cli.main",
        "train",
        str(configuration(folder, device)),
    ]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    result = folder / "seconds.json"
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "BENCH_ROUNDS": str(rounds),
        "BENCH_RESULT": str(result),
    }
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not result.is_file():
        raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def configuration(folder: Path, device: str) -> Path:
    """The demo's stage 1, which is for a CPU; on a GPU without what keeps it there."""
    demo = ROOT / "configs" / "demo" / "stage1.yaml"
    if device == "cpu":
        return demo
    settings = yaml.safe_load(demo.read_text(encoding="utf-8"))
    del settings["ENV"]
    settings.pop("use_cpu", None)
    settings.pop("ddp_backend", None)
    (folder / "stage1.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "stage1.yaml"


def json_rows(seconds: Seconds) -> list[dict[str, object]]:
    """Wall time with more beside less, as tools/bench/gpu.py puts it into a table."""
    names = {"none": "the loss alone", "all": "with all metrics", "watched": "with all that watches them"}
    rows: list[dict[str, object]] = []
    for more, less in BOUNDS:
        ours, theirs = ([wall for wall, _ in seconds[kind]] for kind in (more, less))
        shown = [f"{1e3 * statistics.median(values):.2f} ms" for values in (ours, theirs)]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        rows.append(
            {"what": f"step {names[more]}", "found": shown[0], "against": names[less], "baseline": shown[1],
             "ratios": {"time": ratio}}
        )  # fmt: skip
    return rows


def report(seconds: Seconds) -> bool:
    """Print the table and the ratios; whether those of CPU times keep to their bounds."""
    print(f"{'':<5} {'metrics':<8} {'median ms/step':>15} {'fastest ms/step':>16}")
    clocks = {
        clock: {kind: [one[index] for one in seconds[kind]] for kind in KINDS}
        for index, clock in enumerate(("wall", "CPU"))
    }
    for clock, spent in clocks.items():
        for kind, values in spent.items():
            print(f"{clock:<5} {kind:<8} {1e3 * statistics.median(values):>15.2f} {1e3 * min(values):>16.2f}")
    holds = True
    for (more, less), bound in BOUNDS.items():
        ratios = {
            clock: statistics.median(a / b for a, b in zip(spent[more], spent[less], strict=True))
            for clock, spent in clocks.items()
        }
        holds &= ratios["CPU"] <= bound
        verdict = f"bound {bound}, {'ok' if ratios['CPU'] <= bound else 'MISSED'}"
        print(f"{more} / {less}: CPU time {ratios['CPU']:.3f} ({verdict}), wall {ratios['wall']:.3f}")
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds of 10 steps of each kind")
    parser.add_argument("--preset", default="demo", help="tiny model: demo (2.8M parameters) or nano")
    parser.add_argument("--head", default="auto", choices=("auto", "plain", "fused"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="also write the comparisons there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_trainer(Path(folder), args.preset, args.head, args.rounds, args.device)
    if args.json:
        args.json.write_text(json.dumps(json_rows(seconds)))
    return 0 if report(seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
