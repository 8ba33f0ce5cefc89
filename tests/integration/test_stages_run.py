"""`coordexp run` with a real training: killed in the middle, gone on with, held against its gate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import ROOT, run_coordexp, sft_flags, swift_environment

from coordexp.metrics.sinks import read_payloads
from coordexp.models.checkpoints import last_whole

pytestmark = pytest.mark.slow

STAGES = """\
output_dir: {output}
verify_best: false
stages:
  - name: taught
    run: run.yaml
    overrides: {{max_steps: 2, save_steps: 1, eval_steps: 1, eval_strategy: steps, save_strategy: steps}}
    accept:
      - {{metric: loss, op: "<", value: 100, window: 2}}
      - {{metric: eval_coord_diag/expected_bin_mae, op: "<", value: 1}}
  - {{name: later, run: run.yaml, start_from: {{stage: taught}}}}
"""


def run_file(model: Path, scenes: Path, path: Path) -> Path:
    """The short run of the tests as YAML."""
    words = sft_flags(model, scenes, path.parent / "elsewhere")
    settings: dict[str, object] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        settings[flag.removeprefix("--")] = [value] if "dataset" in flag or "plugins" in flag else value
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return path


def test_killed_in_the_middle_it_goes_on_and_a_gate_that_is_not_met_ends_it(
    nano_model: Path, scenes: Path, tmp_path: Path
):
    run_file(nano_model, scenes, tmp_path / "run.yaml")
    stages, folder = tmp_path / "stages.yaml", tmp_path / "all" / "taught"
    stages.write_text(STAGES.format(output=tmp_path / "all"))
    command = [sys.executable, "-m", "coordexp.cli.main", "run", str(stages)]
    with (tmp_path / "console.txt").open("w") as console:
        process = subprocess.Popen(
            command, cwd=ROOT, env=swift_environment(), start_new_session=True, stdout=console, stderr=console
        )
        while process.poll() is None and last_whole(folder) is None:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "console.txt").read_text()
    done = run_coordexp("run", stages)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "taught: training, from checkpoint-1 on" in done.stdout
    verdict = json.loads((tmp_path / "all" / "verdict.json").read_text())
    assert [stage["outcome"] for stage in verdict["stages"]] == ["refused", "not_run"]
    taught = verdict["stages"][0]
    assert [one["passed"] for one in taught["criteria"]] == [True, False]
    assert (taught["last"], taught["last_step"]) == ("checkpoint-2", 2)
    losses = [p["metrics"]["loss"] for p in read_payloads(folder / "metrics.jsonl") if "loss" in p["metrics"]]
    assert taught["criteria"][0]["found"] == pytest.approx(sum(losses[-2:]) / 2)
    assert (tmp_path / "all" / "taught" / "best").is_dir()
    assert not (tmp_path / "all" / "later").exists()
