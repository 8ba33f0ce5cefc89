"""`coordexp demo`: make a tiny model and scenes, train it as `coordexp run` does, and show before and after.

coordexp demo                                  the mix beside plain cross-entropy: runs/demo/index.html
coordexp demo --recipes mix                    stage 1 alone
coordexp demo --recipes mix ce soft_w1_gate    one more objective
coordexp demo --recipes mix stage2 stage1_continued
                                               then stage 2 beside its control, more of stage 1
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordexp.errors import EXIT_NOT_ACCEPTED, EXIT_OK, ConfigError

RUN = Path("runs/demo")
MODEL, DATA = RUN / "model", RUN / "data"
STAGES, COMPARISONS = Path("configs/stages/demo.yaml"), Path("configs/stages/demo_comparisons.yaml")
RECIPES = {
    "mix": (STAGES, "stage1"),
    "ce": (COMPARISONS, "stage1_ce"),
    "soft_w1_gate": (COMPARISONS, "stage1_soft_w1_gate"),
    "stage2": (STAGES, "stage2_two_channel_clean"),
    "stage1_continued": (COMPARISONS, "stage1_continued"),
}
"""Name -> the stages file that holds it, and its stage there. No two of a file are trained at the same time."""
DEFAULT_RECIPES = ("mix", "ce")
START = RUN / "stage1" / "checkpoint-600"  # of mix; what the recipes of STARTED_LATER go on from
STARTED_LATER = ("stage2", "stage1_continued")
MATCH_GATE = 0.75  # maskIoU above which an object of an answer counts as found, as in the demo of stage 2
NUM_TRAIN, NUM_VAL = 4000, 200
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
    parser.add_argument(
        "--part", action="store_true", help=argparse.SUPPRESS
    )  # of a demo that runs beside it


def run(args: argparse.Namespace) -> int:
    """Run the demo in the working folder; returns the process exit code."""
    try:
        make_assets()
    except ConfigError as error:
        raise ConfigError(f"{error} For the demo's own folder: `make clean-demo`.") from None
    if args.assets_only:
        return EXIT_OK
    if args.part:
        for name in args.recipes:
            train_and_evaluate(name, args.max_steps)
        return EXIT_OK
    from coordexp.cli.console import console, show_table

    started = time.monotonic()
    rows = {"untrained": evaluate_checkpoint("untrained", MODEL)}
    starting = [name for name in args.recipes if name not in STARTED_LATER]
    rows |= train_side_by_side(starting, args.max_steps)
    rows |= train_side_by_side(_going_on(args.recipes, args.max_steps), args.max_steps)
    page = write_page(rows, *args.recipes[:2])
    show_table(
        f"{NUM_VAL} validation images the model never saw",
        ("", *(title for title, _, _ in TABLE)),
        [(name, *(_cell(row.get(key), form) for _, key, form in TABLE)) for name, row in rows.items()],
    )
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes; open {page}")
    return EXIT_OK


def _going_on(recipes: list[str], max_steps: int | None) -> list[str]:
    """Those of `recipes` that go on from `START`.

    Raises ConfigError where it is not there, unless too short a training was asked for to write it.
    """
    from coordexp.cli.console import console

    names = [name for name in recipes if name in STARTED_LATER]
    if not names or START.is_dir():
        return names
    which = " and ".join(names)
    if max_steps is None:
        raise ConfigError(
            f"{which}: starts from {START}, which is not there; train `mix` first, it writes it."
        )
    console.print(f"{which}: skipped, starts from {START}, which so short a `mix` does not write")
    return []


def train_side_by_side(names: list[str], max_steps: int | None) -> dict[str, dict[str, Any]]:
    """The numbers of these recipes; the first is trained here, the others one after another in a process beside it.

    SystemExit where one of them is refused or fails.
    """
    from coordexp.cli.console import console

    if not names:
        return {}
    first, *others = names
    threads = max(1, (os.cpu_count() or 1) // min(2, len(names)))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    words = [] if max_steps is None else ["--max-steps", str(max_steps)]
    command = [sys.executable, "-m", "coordexp.cli.main", "demo", "--part", "--recipes", *others, *words]
    log = RUN / f"part_{'_'.join(others)}.log"
    with contextlib.ExitStack() as stack:
        beside: subprocess.Popen[bytes] | None = None
        if others:
            console.print(f"{' and '.join(others)}: trained at the same time (log: {log})")
            stream = stack.enter_context(log.open("w", encoding="utf-8"))
            beside = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
            stack.callback(_ended, beside)
        rows = {first: train_and_evaluate(first, max_steps)}
        if beside is not None and beside.wait() != 0:
            console.print(log.read_text(encoding="utf-8", errors="replace")[-2000:], markup=False)
            raise SystemExit(beside.returncode)
    return rows | {name: train_and_evaluate(name, max_steps) for name in others}


def _ended(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, as after an interrupt."""
    if process.poll() is None:
        process.terminate()
        process.wait()


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
    from coordexp.files import read_json, write_json

    output, result_file = output_of(name), RUN / f"result_{name}.json"
    seconds = train(name, max_steps)
    checkpoint = last_checkpoint(output)
    made_from = {"weights": _digest(checkpoint / "model.safetensors")}
    if result_file.is_file():
        result = read_json(result_file)
        if result["made_from"] == made_from:
            console.print(f"{name}: up to date, evaluated before (`make clean-demo` starts over)")
            recorded: dict[str, Any] = result["metrics"]
            return recorded
    metrics = {**evaluate_checkpoint(name, checkpoint), "seconds": seconds or training_seconds(output)}
    write_json(result_file, {"made_from": made_from, "metrics": metrics})
    return metrics


def train(name: str, max_steps: int | None) -> float | None:
    """Wall-clock seconds of training the stage of one recipe, None where it was trained before.

    What it starts from is trained anew where that changed. SystemExit when a stage is refused.
    max_steps: in place of those of its run file; criteria are left out then.
    """
    from coordexp.cli.console import console, progress
    from coordexp.stages import processes
    from coordexp.stages.plan import PlannedStage, load_stages
    from coordexp.stages.runner import StageRunner

    file, stage_name = RECIPES[name]
    words = () if max_steps is None else ("--max_steps", str(max_steps), "--save_steps", str(max_steps))
    plan = load_stages(file, overrides={stage_name: words})
    stage = plan.stages[plan.index(stage_name)]
    needed = [] if stage.start is None else [plan.stages[plan.index(stage.start[0])]]
    if max_steps is not None:
        stage = replace(stage, criteria=())
    plan = replace(plan, stages=(*needed, stage))
    with progress("steps", f"training {name}") as advance:
        shown, seconds = 0, None

        def train_stage(*arguments: Any, **options: Any) -> int:
            nonlocal seconds
            started = time.monotonic()
            code = processes.train(*arguments, **options)
            seconds = time.monotonic() - started
            return code

        def watch(running: PlannedStage) -> None:
            nonlocal shown
            step, total = _steps_done(running.output)
            advance(step - shown, total)
            shown = max(shown, step)

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        runner = StageRunner(
            plan, say, watch=watch, train=train_stage, replaces=True,
            environment={"OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        verdict = runner.run()
    if not verdict["accepted"]:
        raise SystemExit(EXIT_NOT_ACCEPTED)
    return seconds


def training_seconds(output: Path) -> float | None:
    """Wall-clock seconds of a training, as it logs them at its end."""
    from coordexp.metrics.keys_run import TRAIN_RUNTIME
    from coordexp.metrics.sinks import METRICS_FILE, read_payloads

    found = [payload["metrics"].get(TRAIN_RUNTIME) for payload in read_payloads(output / METRICS_FILE)]
    return next((float(seconds) for seconds in reversed(found) if seconds is not None), None)


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
            coord=None, on_images=advance,
        )  # fmt: skip
    score_directory(output)
    return {**evaluate_directory(output), **on_policy_numbers(images, gate=MATCH_GATE)}


def output_of(name: str) -> Path:
    """The run folder of a recipe."""
    file, stage = RECIPES[name]
    return (RUN if file == STAGES else RUN / "comparisons") / stage


def last_checkpoint(output: Path) -> Path:
    """The checkpoint folder with the highest step."""
    from coordexp.models.checkpoints import checkpoints_of

    found = checkpoints_of(output)
    if not found:
        raise ConfigError(f"{output} holds no checkpoint-N folder; see the training log beside it.")
    return found[-1]


def write_page(rows: dict[str, dict[str, Any]], recipe: str, other: str | None = None) -> Path:
    """runs/demo/index.html with the curves of `recipe`, and pictures of its answers.

    other: a recipe whose answers are shown beside them, those pictures first where the two differ most.
    """
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
        gallery=gallery(
            {name: RUN / f"eval_{name}" for name in (recipe, other) if name},
            DATA,
            RUN / "pictures",
            GALLERY_SIZE,
        ),
        notes={
            "title": "CoordExp demo",
            "summary": f"A {_parameters(MODEL):.1f}M-parameter Qwen3-VL, trained from random weights on {NUM_TRAIN} "
            f"synthetic scenes to write its detections as text. {NUM_VAL} validation images it never saw.",
            "commands": [
                f"coordexp model tiny --output {MODEL}",
                f"coordexp data shapes --output {DATA} --train {NUM_TRAIN} --val {NUM_VAL}",
                f"coordexp run {RECIPES[recipe][0]}",
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
