"""A trainer that takes half a second, and a runner of stages around it: processes to be killed at any moment.

    python stage_programs.py run STAGES.yaml                  what `coordexp run` does, with this trainer
    python stage_programs.py train RUN.yaml --flags ...       writes what the HF Trainer writes, in its order

The weights are a vector that each step changes by a fixed rule. Every file is written with a pause before it, so that
a kill leaves checkpoints torn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from coordexp.config import load_run_config
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink

PAUSE_S = float(os.environ.get("STAGE_PAUSE_S", "0"))


def train(run_file, words, log, *, lock, watch, environment) -> int:
    """As `coordexp.stages.processes.train`."""
    command = [sys.executable, __file__, "train", str(run_file), *words]
    with log.open("a") as stream:
        return subprocess.run(command, stdout=stream, stderr=stream, check=False, pass_fds=(lock,)).returncode


def step_of_weights(weights: np.ndarray, rate: float) -> np.ndarray:
    return weights - rate * (weights + np.sin(weights))


def main(run_file: str, words: list[str]) -> None:
    swift = load_run_config(run_file, words).swift
    run, last, rate = Path(swift["output_dir"]), int(swift["max_steps"]), float(swift["learning_rate"])
    resumed = swift.get("resume_from_checkpoint")
    start = Path(str(resumed or swift["model"]))
    weights = load_file(start / "model.safetensors")["w"]
    state = json.loads((start / "trainer_state.json").read_text()) if resumed else {"global_step": 0}
    best = (state.get("best_metric", np.inf), state.get("best_global_step"))
    run.mkdir(parents=True, exist_ok=True)
    derived = {"metric_for_best_model": "loss", "greater_is_better": False}
    (run / "resolved_config.json").write_text(json.dumps({"derived": derived, "swift": {}}))
    sink = MetricsSink(run, meta={"config_hash": "x"})
    for step in range(state["global_step"] + 1, last + 1):
        weights = step_of_weights(weights, rate)
        loss = float(np.abs(weights).sum())
        time.sleep(PAUSE_S)
        sink.write(build_payload("train", step, {"loss": loss}))
        sink.write(build_payload("eval", step, {"eval_loss": loss}))
        if loss < best[0]:
            best = (loss, step)
        save(run / f"checkpoint-{step}", weights, step, last, best)
    sink.write(build_payload("train", last, {"train_runtime": 1.0}))


def save(folder: Path, weights: np.ndarray, step: int, last: int, best: tuple[float, int | None]) -> None:
    folder.mkdir(exist_ok=True)
    time.sleep(PAUSE_S)
    save_file({"w": weights}, folder / "model.safetensors")
    time.sleep(PAUSE_S)
    (folder / "optimizer.pt").touch()
    state = {"global_step": step, "max_steps": last, "best_metric": best[0], "best_global_step": best[1]}
    text = json.dumps(state)
    with (folder / "trainer_state.json").open("w") as stream:
        stream.write(text[:20])
        stream.flush()
        time.sleep(PAUSE_S)
        stream.write(text[20:])


if __name__ == "__main__":
    if sys.argv[1] == "train":
        main(sys.argv[2], sys.argv[3:])
    else:
        from coordexp.stages.plan import load_stages
        from coordexp.stages.runner import StageRunner

        verdict = StageRunner(load_stages(sys.argv[2]), print, train=train).run()
        sys.exit(0 if verdict["accepted"] else 3)
