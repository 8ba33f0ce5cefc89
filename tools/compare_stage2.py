"""Stage 2 against more of stage 1: the same number of optimizer steps from the same checkpoint, over several seeds.

    python tools/compare_stage2.py --start runs/demo/stage1/checkpoint-400 --seeds 1 2 3

Trains every configuration once per seed, lets each final checkpoint answer the validation images (greedy), and prints
one table: the checkpoint they all start from, then mean and spread over seeds for each. Runs that are there already are
not repeated. Everything is written below `--output`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from training_run import run_training

from coordexp.files import write_json

CONFIGS = {
    "stage 1 continued": Path("configs/demo/stage1_continued.yaml"),
    "rollout-aligned": Path("configs/stage2_rollout_aligned/demo.yaml"),
    "two-channel": Path("configs/stage2_two_channel/demo.yaml"),
}
NUMBERS = (
    "rollout_f1@0.5", "rollout_f1@0.75", "box_f1_50_95", "f1_at_50", "AP", "bin_error", "desc_acc", "parse_rate",
    "answer_rate",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start", type=Path, required=True, help="stage-1 checkpoint that all runs start from"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("runs/demo/data"), help="folder of train.jsonl and val.jsonl"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--configs", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=Path("runs/compare_stage2"))
    parser.add_argument("flags", nargs="*", help="flags for all runs, after `--`: -- --max_steps 60")
    args = parser.parse_args()
    results = {"start": [numbers_of(args.start, args.data, args.output / "start")]}
    for name in args.configs:
        results[name] = []
        for seed in args.seeds:
            run_dir = args.output / f"{name.replace(' ', '_')}_{seed}"
            seeds = ["--seed", str(seed), "--data_seed", str(seed)]  # the second orders the training samples
            checkpoint = train(CONFIGS[name], run_dir, ["--model", str(args.start), *seeds, *args.flags])
            results[name].append(numbers_of(checkpoint, args.data, run_dir / "eval"))
    write_json(args.output / "results.json", results)
    show(results)
    return 0


def train(config: Path, run_dir: Path, flags: list[str]) -> Path:
    """The last checkpoint of a run with these flags; trained now unless it is there."""
    found = sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    if found:
        return found[-1]
    saving = [
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "100000", "--save_only_model", "true",
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    run_training(config, run_dir, [*saving, *flags], threads)
    return train(config, run_dir, flags)


def numbers_of(checkpoint: Path, data: Path, output: Path) -> dict[str, Any]:
    """Metrics of the greedy answers of a checkpoint to the validation images."""
    from coordexp.cli.demo.demo_cmd import BATCH_SIZE, MAX_NEW_TOKENS
    from coordexp.eval.evaluate import evaluate_directory
    from coordexp.eval.on_policy import on_policy_numbers
    from coordexp.eval.predictions.confidence import score_directory
    from coordexp.inference.infer import infer_file

    images = infer_file(
        checkpoint, data / "val.jsonl", output, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS
    )
    score_directory(output)
    strict, lenient = on_policy_numbers(images, gate=0.75), on_policy_numbers(images, gate=0.5)
    f1 = {"rollout_f1@0.5": lenient["rollout_f1"], "rollout_f1@0.75": strict["rollout_f1"]}
    return {**evaluate_directory(output), **lenient, **f1}


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(
        "", *NUMBERS, title="greedy answers to the validation images: mean (lowest to highest) over seeds"
    )
    for name, runs in results.items():
        cells = []
        for number in NUMBERS:
            values = [run[number] for run in runs if number in run]
            if not values:
                cells.append("-")
                continue
            digits = 1 if number == "bin_error" else 3
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        table.add_row(name, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
