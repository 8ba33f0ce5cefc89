"""How long a whole `coordexp eval` takes against pycocotools' average precision alone, on random detections.

    OMP_NUM_THREADS=1 python tools/bench/bench_eval.py [--images 5000] [--detections 100]

First `coordexp eval` in a process of its own, from the run's file to the written tables (average precision with scores
and without, F1 at ten thresholds with and without descriptions). Then pycocotools on data in memory: index, results,
evaluate, accumulate. Columns: CPU seconds, so that a busy neighbour does not count, and wall seconds. The bench fails
unless AP is equal to 1e-9 and the command takes at most a fifth of pycocotools' CPU time. Last, the command's parts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coordexp.eval.evaluate import evaluate, from_run, write_evaluation
from coordexp.eval.predictions.artifacts import SCORED
from coordexp.files import read_json, write_jsonl

NUM_CLASSES, GT_PER_IMAGE, WIDTH, HEIGHT = 80, 8, 640, 480


def random_lines(num_images: int, num_detections: int, seed: int = 0) -> list[dict]:
    """Images with about 8 objects of 80 classes; half of the detections near an object, the others anywhere."""
    rng = np.random.default_rng(seed)
    return [_line(rng, index, num_detections) for index in range(num_images)]


def _line(rng: np.random.Generator, index: int, num_detections: int) -> dict:
    num_gt = int(rng.integers(0, 2 * GT_PER_IMAGE + 1))
    gt_boxes, gt_classes = _boxes(rng, num_gt), rng.integers(0, NUM_CLASSES, num_gt)
    boxes, classes = _boxes(rng, num_detections), rng.integers(0, NUM_CLASSES, num_detections)
    if num_gt:
        near = rng.random(num_detections) < 0.5
        partner = rng.integers(0, num_gt, num_detections)
        boxes[near] = gt_boxes[partner[near]] + rng.normal(0, 6, (near.sum(), 4))
        classes[near] = gt_classes[partner[near]]
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], axis=1)
    scores = rng.random(num_detections)
    return {
        "image_id": index,
        "image": f"{index}.jpg",
        "width": WIDTH,
        "height": HEIGHT,
        "coord_mode": "pixel",
        "gt": [_object(box, k) for box, k in zip(gt_boxes, gt_classes, strict=True)],
        "pred": [
            {**_object(box, k), "score": float(score)}
            for box, k, score in zip(boxes, classes, scores, strict=True)
        ],
        "errors": {},
        "pred_score_source": "random",
        "pred_score_version": 1,
    }


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 0.7, (count, 2)) * (WIDTH, HEIGHT)
    return np.concatenate([corners, corners + rng.uniform(8, 190, (count, 2))], axis=1)


def _object(box: np.ndarray, k: int) -> dict:
    return {"type": "bbox_2d", "points": [round(float(v), 2) for v in box], "desc": f"class {k:02}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    args = parser.parse_args()
    print(f"{args.images} images x {args.detections} detections, {NUM_CLASSES} classes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_jsonl(run / SCORED, random_lines(args.images, args.detections))
        command = command_seconds(run)
        gt, preds = read_json(run / "coco_gt.json"), read_json(run / "coco_preds.json")
        average_precision = read_json(run / "metrics.json")["AP"]
        reference = timed("pycocotools, AP alone", lambda: pycocotools_ap(gt, preds))
        print(f"{'ratio':40}{command.cpu / reference.cpu:9.3f}{command.wall / reference.wall:9.3f}")
        read = timed("    its parts: read", lambda: from_run(run))
        evaluation = timed("    evaluate", lambda: evaluate(read.value))
        timed("    write", lambda: write_evaluation(evaluation.value, run))
    if abs(average_precision - reference.value) > 1e-9:
        raise SystemExit(f"AP is {average_precision}, pycocotools' {reference.value}")
    if command.cpu > reference.cpu / 5:
        raise SystemExit("coordexp eval takes more than a fifth of pycocotools' time")


def command_seconds(run: Path) -> Timed:
    """`coordexp eval --run RUN` in a process of its own."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "coordexp.cli.main", "eval", "--run", str(run)],
        check=True,
        capture_output=True,
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{'coordexp eval':40}{cpu:9.1f}{wall:9.1f}", flush=True)
    return Timed(None, cpu, wall)


def pycocotools_ap(gt: dict[str, Any], preds: list[dict[str, Any]]) -> float:
    """AP by pycocotools itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = gt
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(preds), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


class Timed(NamedTuple):
    """What a call returned, its CPU seconds (all threads) and its wall seconds."""

    value: Any
    cpu: float
    wall: float


def timed(name: str, call: Callable[[], Any]) -> Timed:
    """Call, print both times on one line and return them."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = Timed(call(), time.process_time() - cpu, time.perf_counter() - wall)
    print(f"{name:40}{found.cpu:9.1f}{found.wall:9.1f}", flush=True)
    return found


if __name__ == "__main__":
    main()
