"""`coordexp demo`: make a tiny model and scenes, train it through `swift sft`, and show before and after.

coordexp demo                                   stage 1, then stage 2 from its checkpoint: runs/demo/index.html
coordexp demo --recipes mix                     stage 1 alone
coordexp demo --recipes mix soft_w1_gate ce     the same budget and seed for three objectives, one table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coordexp.errors import EXIT_FAILURE, EXIT_OK, ConfigError

RUN = Path("runs/demo")
MODEL, DATA = RUN / "model", RUN / "data"
ASSET_STAMPS = (MODEL / "coordexp_tiny_model.json", DATA / "shapes.json")  # what the assets were made from
RECIPES = {
    "mix": Path("configs/demo/stage1.yaml"),
    "soft_w1_gate": Path("configs/demo/stage1_soft_w1_gate.yaml"),
    "ce": Path("configs/demo/stage1_ce.yaml"),
    "stage1_continued": Path("configs/demo/stage1_continued.yaml"),
    "stage2": Path("configs/stage2_rollout_aligned/demo.yaml"),
}
DEFAULT_RECIPES = ("mix", "stage1_continued", "stage2")
START = RUN / "stage1" / "checkpoint-400"  # of mix; what the recipes of STARTED_LATER go on from
STARTED_LATER = ("stage1_continued", "stage2")
MATCH_GATE = 0.75  # maskIoU above which an object of an answer counts as found, as in the demo of stage 2
NUM_TRAIN, NUM_VAL = 8000, 200
MAX_NEW_TOKENS = 112  # two objects need about 60
BATCH_SIZE = 50
GALLERY_SIZE = 12
TABLE = (
    ("F1@0.5", "f1_at_50", "{:.3f}"),
    ("F1@0.5:0.95", "f1_50_95", "{:.3f}"),
    ("boxes alone", "box_f1_50_95", "{:.3f}"),
    ("mAP", "AP", "{:.3f}"),
    ("rollout F1", "rollout_f1", "{:.3f}"),
    ("bin error", "bin_error", "{:.1f}"),
    ("seconds", "seconds", "{:.0f}"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `demo`."""
    parser = subparsers.add_parser("demo", help="train and evaluate a tiny detector on synthetic scenes")
    parser.add_argument("--assets-only", action="store_true", help="only make the model and the scenes")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(DEFAULT_RECIPES),
                        metavar="NAME", help=f"what to train, of {', '.join(RECIPES)} "
                        f"(default: {' '.join(DEFAULT_RECIPES)})")  # fmt: skip
    parser.add_argument("--max-steps", type=int, help="train every recipe for fewer steps than its file says")


def run(args: argparse.Namespace) -> int:
    """Run the demo from the repository root; returns the process exit code."""
    if not RECIPES["mix"].is_file():
        raise ConfigError(f"{RECIPES['mix']} not found: run the demo from the root of the repository.")
    try:
        make_assets()
    except ConfigError as error:
        raise ConfigError(f"{error} For the demo's own folder: `make clean-demo`.") from None
    if args.assets_only:
        return EXIT_OK
    from coordexp.cli.console import console, show_table

    started = time.monotonic()
    rows = {"untrained": evaluate_checkpoint("untrained", MODEL)}
    for name in args.recipes:
        if name in STARTED_LATER and not START.is_dir():
            if args.max_steps is None:
                raise ConfigError(
                    f"{name} starts from {START}, which is not there; train `mix` first, it writes it."
                )
            console.print(f"{name}: skipped, it starts from {START}, which so short a `mix` does not write")
            continue
        if name in STARTED_LATER and "start of stage 2" not in rows:
            rows["start of stage 2"] = evaluate_checkpoint("start", START)
        rows[name] = train_and_evaluate(name, args.max_steps)
    page = write_page(rows, args.recipes[0])
    show_table(
        f"{NUM_VAL} validation images the model never saw",
        ("", *(title for title, _, _ in TABLE)),
        [(name, *(_cell(row.get(key), form) for _, key, form in TABLE)) for name, row in rows.items()],
    )
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes; open {page}")
    return EXIT_OK


def make_assets() -> None:
    """The tiny model and the scenes, unless they are already there."""
    from coordexp.cli.console import progress
    from coordexp.data.shapes import PRESETS, generate_shapes
    from coordexp.models.tiny import build_tiny_model

    with progress("scenes", "drawing") as advance:
        generate_shapes(
            DATA, PRESETS["demo"], num_train=NUM_TRAIN, num_val=NUM_VAL, seed=0,
            on_scene=lambda: advance(1, NUM_TRAIN + NUM_VAL),
        )  # fmt: skip
    build_tiny_model(MODEL, preset="demo", seed=0)


def train_and_evaluate(name: str, max_steps: int | None) -> dict[str, Any]:
    """The numbers of one recipe; taken from the last run when nothing that they depend on has changed."""
    from coordexp.cli.console import console
    from coordexp.config import config_hash, load_run_config
    from coordexp.files import read_json, write_json

    result_file = RUN / f"result_{name}.json"
    overrides = [] if max_steps is None else ["--max_steps", str(max_steps), "--save_steps", str(max_steps)]
    config = load_run_config(RECIPES[name], overrides=overrides)
    output = Path(config.swift["output_dir"])
    made_from = {
        "config_hash": config_hash(config.variant, config.sections, config.swift),
        "seed": config.swift.get("seed"),
        "assets": hashlib.sha256(b"".join(path.read_bytes() for path in ASSET_STAMPS)).hexdigest(),
        "start": _digest(START / "model.safetensors") if name in STARTED_LATER else None,
    }
    if result_file.is_file():
        result = read_json(result_file)
        if result["made_from"] == made_from and list(output.glob("checkpoint-*")):
            console.print(f"{name}: up to date, trained before (`make clean-demo` starts over)")
            recorded: dict[str, Any] = result["metrics"]
            return recorded
    seconds = train(name, output, overrides)
    metrics = {
        **evaluate_checkpoint(name, last_checkpoint(output)),
        "seconds": seconds,
    }
    write_json(result_file, {"made_from": made_from, "metrics": metrics})
    return metrics


def train(name: str, output: Path, overrides: list[str]) -> float:
    """Train one recipe in a process of its own, with a progress bar; returns its wall-clock seconds."""
    from coordexp.cli.console import console, progress

    shutil.rmtree(output, ignore_errors=True)
    log = RUN / f"train_{name}.log"
    command = [sys.executable, "-m", "coordexp.cli.main", "train", str(RECIPES[name]), *overrides]
    console.print(f"coordexp train {' '.join(command[4:])}   (log: {log})")
    threads = str(os.cpu_count() or 1)
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream, progress("steps", f"training {name}") as advance:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        shown = 0
        while process.poll() is None:
            step, total = _steps_done(output)
            advance(step - shown, total)
            shown = max(shown, step)
            time.sleep(1.0)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        console.print(tail, markup=False)
        raise SystemExit(process.returncode or EXIT_FAILURE)
    return time.monotonic() - started


def evaluate_checkpoint(name: str, checkpoint: Path) -> dict[str, Any]:
    """Greedy rollouts on the validation images -> predictions, scores, metrics, in runs/demo/eval_NAME.

    bin_error is that of the answers: mean coordinate error of found boxes, in bins.
    """
    from coordexp.cli.console import progress
    from coordexp.eval.evaluate import evaluate_directory
    from coordexp.eval.on_policy import on_policy_numbers
    from coordexp.eval.predictions.confidence import score_directory
    from coordexp.inference.infer import infer_file

    output = RUN / f"eval_{name}"
    with progress("images", f"rollouts, {name}") as advance:
        images = infer_file(
            checkpoint, DATA / "val.jsonl", output, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS,
            on_images=advance,
        )  # fmt: skip
    score_directory(output)
    return {**evaluate_directory(output), **on_policy_numbers(images, gate=MATCH_GATE)}


def output_of(name: str) -> Path:
    """The run directory that a recipe's file names."""
    from coordexp.config import load_run_config

    return Path(load_run_config(RECIPES[name]).swift["output_dir"])


def last_checkpoint(output: Path) -> Path:
    """The checkpoint folder with the highest step."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    if not found:
        raise ConfigError(f"{output} holds no checkpoint-N folder; see the training log beside it.")
    return found[-1]


def write_page(rows: dict[str, dict[str, Any]], recipe: str) -> Path:
    """runs/demo/index.html with the curves and the gallery of `recipe`."""
    from coordexp.cli.demo.demo_gallery import gallery
    from coordexp.eval.report.demo_page import HeadlineRow, write_demo_page
    from coordexp.eval.report.pictures import plot_curves
    from coordexp.metrics.sinks import read_payloads

    payloads = list(read_payloads(output_of(recipe) / "metrics.jsonl"))
    headline: list[HeadlineRow] = [
        {
            "name": name, "f1_50": row["f1_at_50"], "f1_mean": row["f1_50_95"], "precision": row["precision_at_50"],
            "recall": row["recall_at_50"], "map": row["AP"], "bin_error": row.get("bin_error"),
            "seconds": row.get("seconds"),
        }
        for name, row in sorted(rows.items(), key=lambda item: item[0] == recipe)
    ]  # fmt: skip
    return write_demo_page(
        RUN,
        headline=headline,
        curves=plot_curves(payloads, RUN / "curves"),
        gallery=gallery(RUN / f"eval_{recipe}", DATA, RUN / "pictures", GALLERY_SIZE),
        notes={
            "title": "CoordExp demo",
            "summary": f"A {_parameters(MODEL):.1f}M-parameter Qwen3-VL, trained from random weights on {NUM_TRAIN} "
            f"synthetic scenes to write its detections as text. {NUM_VAL} validation images it never saw.",
            "commands": [
                f"coordexp model tiny --output {MODEL}",
                f"coordexp data shapes --output {DATA} --train {NUM_TRAIN} --val {NUM_VAL}",
                f"swift sft {RECIPES[recipe]}",
                f"coordexp infer --model {last_checkpoint(output_of(recipe))} --data {DATA}/val.jsonl "
                f"--output {RUN}/eval_{recipe}",
                f"coordexp score --run {RUN}/eval_{recipe}",
                f"coordexp eval --run {RUN}/eval_{recipe}",
            ],
        },
    )


def _steps_done(output: Path) -> tuple[int, int | None]:
    """(optimizer steps, steps in all) of a running training, read from what ms-swift logs."""
    from coordexp.metrics.keys_run import PROGRESS

    log = output / "logging.jsonl"
    if not log.is_file():
        return 0, None
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):
        progress = json.loads(line).get(PROGRESS) if line.endswith("}") else None
        if progress:
            step, total = progress.split("/")
            return int(step), int(total)
    return 0, None


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _parameters(model: Path) -> float:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as weights:
        sizes = [math.prod(weights.get_slice(key).get_shape()) for key in weights.keys()]  # noqa: SIM118
    return float(sum(sizes)) / 1e6


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
