"""Time of a stage-2 step that trains while its rollouts are generated, over one that waits for all of them.

    python tools/bench/bench_overlap.py
    python tools/bench/bench_overlap.py --batch-size 64 --decode-batch-size 8 --rounds 5

Two processes: `coordexp rollout-server` and `coordexp train configs/stage2_rollout_aligned/demo.yaml` on synthetic
scenes. With two free cores they share nothing, like an engine on a GPU of its own. The model is untrained, so every
answer has `max_new_tokens` tokens: generation takes the same time in every step.

    waits      overlap.enabled: false
    overlaps   overlap.enabled: true

A round is one run of each kind, in changing order. The time of a step is that of steps 4 to the last of a run, divided
by their number; ratios are taken within a round. Exit status 1 when the median ratio is above 1: overlap costs time.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordexp.data.shapes import PRESETS, generate_shapes
from coordexp.metrics.sinks import read_payloads
from coordexp.models.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]
NUM_WARM_STEPS = 3
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


@dataclass(frozen=True)
class Timing:
    """Per step: seconds, seconds spent waiting for rollouts or generating them, early forwards."""

    step_s: float
    wait_s: float
    early_forwards: float


@contextmanager
def server(model: Path, port: int, group_port: int) -> Iterator[None]:
    """A rollout server in a session of its own."""
    argv = [
        sys.executable,
        "-m",
        "coordexp.cli.main",
        "rollout-server",
        "--model",
        str(model),
        "--enforce-eager",
    ]
    argv += [
        "--port",
        str(port),
        "--group-port",
        str(group_port),
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
    ]
    log = model.parent / "server.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            argv, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def train(folder: Path, name: str, overlap: bool, ports: tuple[int, int], args: argparse.Namespace) -> Timing:
    """One run."""
    where = f"{{servers: [{{base_url: 'http://127.0.0.1:{ports[0]}', group_port: {ports[1]}}}]}}"
    settings = {
        "backend": "vllm",
        "vllm": f"{{mode: server, server: {where}}}",
        "decode_batch_size": args.decode_batch_size,
        "max_new_tokens": args.max_new_tokens,
        "overlap": f"{{enabled: {str(overlap).lower()}}}",
    }
    flags: dict[str, Any] = {
        "model": folder / "model",
        "dataset": folder / "data" / "train.jsonl",
        "val_dataset": folder / "data" / "val.jsonl",
        "output_dir": folder / name,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.forward_size,
        "gradient_accumulation_steps": args.batch_size // args.forward_size,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "set": [f"rollout_matching.{key}={value}" for key, value in settings.items()],
    }
    argv = [sys.executable, "-m", "coordexp.cli.main", "train"]
    argv += [str(ROOT / "configs" / "stage2_rollout_aligned" / "demo.yaml")]
    for flag, value in flags.items():
        argv += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    payloads = read_payloads(folder / name / "metrics.jsonl")
    steps = [p["metrics"] for p in payloads if p["mode"] == "train" and "learning_rate" in p["metrics"]]
    elapsed = [number * step["train_speed(s/it)"] for number, step in enumerate(steps, start=1)]
    measured = steps[NUM_WARM_STEPS:]
    waited = "time/rollout_wait_s" if overlap else "time/rollout_generate_s"
    return Timing(
        step_s=(elapsed[-1] - elapsed[NUM_WARM_STEPS - 1]) / len(measured),
        wait_s=statistics.mean(step[waited] for step in measured),
        early_forwards=statistics.mean(step.get("rollout/early_forwards", 0.0) for step in measured),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(rounds: list[dict[str, Timing]]) -> bool:
    """Print the table; whether overlap did not cost time."""
    print(f"{'':<9} {'s/step':>8} {'s waiting':>10} {'early forwards':>15}   (medians)")
    for kind in ("waits", "overlaps"):
        rows = [one[kind] for one in rounds]
        columns = [
            statistics.median(getattr(row, name) for row in rows)
            for name in ("step_s", "wait_s", "early_forwards")
        ]
        print(f"{kind:<9} {columns[0]:>8.3f} {columns[1]:>10.3f} {columns[2]:>15.1f}")
    ratios = [one["overlaps"].step_s / one["waits"].step_s for one in rounds]
    print(
        f"overlaps / waits: {statistics.median(ratios):.3f} (each round: {', '.join(f'{r:.3f}' for r in ratios)})"
    )
    return statistics.median(ratios) <= 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=13, help=f"of a run; the first {NUM_WARM_STEPS} are not measured"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a step")
    parser.add_argument("--forward-size", type=int, default=8, help="samples of a forward")
    parser.add_argument("--decode-batch-size", type=int, default=8, help="answers generated at once")
    parser.add_argument("--max-new-tokens", type=int, default=112)
    args = parser.parse_args()
    rounds: list[dict[str, Timing]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, ports = Path(name), (free_port(), free_port())
        build_tiny_model(folder / "model", preset="demo", seed=0)
        generate_shapes(folder / "data", PRESETS["demo"], num_train=4 * args.batch_size, num_val=1, seed=0)
        with server(folder / "model", *ports):
            for number in range(args.rounds):
                kinds = ("waits", "overlaps") if number % 2 == 0 else ("overlaps", "waits")
                rounds.append(
                    {
                        kind: train(folder, f"{kind}_{number}", kind == "overlaps", ports, args)
                        for kind in kinds
                    }
                )
    return 0 if report(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
