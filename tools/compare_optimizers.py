"""AdamW against Muon on the demo's stage 1: the same budget, over learning rates of Muon and over seeds.

    python -m coordexp.cli.main demo --assets-only
    python tools/compare_optimizers.py --scales 0.3 1 3 --seeds 1 2 3

With the first seed Muon is trained with every `lr_scale`; the one of the highest F1 (boxes and descriptions, IoU
0.5:0.95) goes on to the other seeds, as AdamW does. The scale is chosen and reported on the same images, which favours
Muon. Every checkpoint answers the validation images (greedy). Runs that are there already are not repeated. Everything
is written below `--output`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training_run import run_training

from coordexp.files import read_json, write_json

CONFIG = Path("configs/demo/stage1.yaml")
NUMBERS = {
    "eval_loss": "loss",
    "bin_mae": "bin error, teacher-forced",
    "f1_at_50": "F1@0.5",
    "f1_50_95": "F1@0.5:0.95",
    "box_f1_50_95": "boxes alone",
    "AP": "mAP",
    "cpu_s_per_step": "CPU s a step",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="lr_scale of Muon")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--output", type=Path, default=Path("runs/compare_optimizers"))
    args = parser.parse_args()
    first, *others = args.seeds
    results = {("AdamW", first): run(args, "coord_adamw", None, first)}
    for scale in args.scales:
        results[_muon(scale), first] = run(args, "coord_muon", scale, first)
        show(results)
    best = max(args.scales, key=lambda scale: results[_muon(scale), first]["f1_50_95"])
    for seed in others:
        results[_muon(best), seed] = run(args, "coord_muon", best, seed)
        results["AdamW", seed] = run(args, "coord_adamw", None, seed)
        show(results)
    return 0


def _muon(scale: float) -> str:
    return f"Muon, lr_scale {scale:g}"


def run(args: argparse.Namespace, optimizer: str, scale: float | None, seed: int) -> dict[str, float]:
    """The numbers of a run; trained and evaluated now unless they are there."""
    folder = args.output / f"{optimizer}{'' if scale is None else f'_{scale:g}'}_seed{seed}"
    result = folder / "result.json"
    if not result.is_file():
        flags = [] if scale is None else ["--custom.optimizer.muon.lr_scale", str(scale)]
        seconds = train(folder, optimizer, seed, args.steps, args.batch, flags)
        answers = numbers_of(folder / f"checkpoint-{args.steps}", folder / "eval")
        numbers = {**teacher_forced(folder), **answers, "cpu_s_per_step": seconds / args.steps}
        write_json(result, {key: numbers.get(key) for key in NUMBERS})
    found: dict[str, float] = read_json(result)
    return found


def train(folder: Path, optimizer: str, seed: int, steps: int, batch: int, flags: list[str]) -> float:
    """Train, and return the CPU seconds it took, its start among them."""
    all_flags = [
        "--optimizer", optimizer, "--seed", str(seed), "--data_seed", str(seed), "--max_steps", str(steps),
        "--per_device_train_batch_size", str(batch), "--eval_steps", str(steps), "--save_steps", str(steps),
        "--save_only_model", "true", "--logging_steps", "20", *flags,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return run_training(CONFIG, folder, all_flags, threads).cpu_s


def teacher_forced(folder: Path) -> dict[str, float]:
    """Loss and coordinate error of the evaluation at the end of a run."""
    from coordexp.files import read_jsonl

    records = [line for _, line in read_jsonl(folder / "metrics.jsonl") if line.get("mode") == "eval"]
    metrics = records[-1]["metrics"]  # of the last step
    return {"eval_loss": metrics["eval_loss"], "bin_mae": metrics["eval_coord_diag/expected_bin_mae"]}


def numbers_of(checkpoint: Path, output: Path) -> dict[str, Any]:
    """Metrics of the greedy answers of a checkpoint to the validation images."""
    from coordexp.cli.demo.demo_cmd import BATCH_SIZE, DATA, MAX_NEW_TOKENS
    from coordexp.eval.evaluate import evaluate_directory
    from coordexp.eval.predictions.confidence import score_directory
    from coordexp.inference.infer import infer_file

    infer_file(checkpoint, DATA / "val.jsonl", output, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
    score_directory(output)
    return evaluate_directory(output)


def show(results: dict[tuple[str, int], dict[str, float]]) -> None:
    """The table so far: mean and, over several seeds, standard deviation."""
    print("|", " | ".join(("optimizer", "seeds", *NUMBERS.values())), "|")
    print("|---" * (len(NUMBERS) + 2) + "|")
    for name in dict.fromkeys(name for name, _ in results):
        runs = [numbers for (other, _), numbers in results.items() if other == name]
        cells = [_cell([one[key] for one in runs], 1 if key == "bin_mae" else 3) for key in NUMBERS]
        print("|", " | ".join((name, str(len(runs)), *cells)), "|", flush=True)


def _cell(values: list[float], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"


if __name__ == "__main__":
    raise SystemExit(main())
