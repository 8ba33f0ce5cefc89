"""A small study with real processes: stopped in the middle of a training, and gone on with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT, run_coordexp, swift_environment

from coordexp.cli.main import main
from coordexp.files import read_json, read_jsonl
from coordexp.metrics.sinks import read_payloads

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STUDY = """
name: small
output: {output}
seeds: [4]
data: {{few: {{shapes: {{preset: few, train: 12, val: 3}}}}}}
model: {{preset: nano}}
overrides: {{per_device_train_batch_size: 4, logging_steps: 5}}
recipes:
  untrained: {{budget: {{steps: 0}}}}
  ce: {{label: plain CE, config: configs/demo/stage1_ce.yaml, budget: {{steps: 60}}, save_steps: 10}}
  broken: {{config: configs/demo/stage1.yaml, overrides: {{deepspeed: nowhere.json}}, budget: {{steps: 2}}}}
  after_broken: {{start_from: {{recipe: broken}}, budget: {{steps: 0}}}}
baseline: untrained
evaluate: {{score: [logprob, expected_iou], max_new_tokens: 16, batch_size: 3}}
bootstrap: {{resamples: 100, resamples_ap: 100}}
"""


class Stopped:
    """A study that was asked to end while it trained, and then run again to its end."""

    def __init__(self, root: Path) -> None:
        self.file, self.output = root / "study.yaml", root / "study"
        self.file.write_text(STUDY.format(output=self.output), encoding="utf-8")
        self.cell = self.output / "few" / "ce" / "seed4"
        self.first_exit_code = self._stop_in_training()
        self.left_behind = [(self.cell / name).exists() for name in ("cell.json", "checkpoint-60")]
        self.again = run_coordexp("study", self.file, "--jobs", 2, timeout=900)

    def _stop_in_training(self) -> int:
        command = [sys.executable, "-m", "coordexp.cli.main", "study", str(self.file), "--jobs", "2"]
        process = subprocess.Popen(command, env=swift_environment(), cwd=ROOT)
        deadline = time.monotonic() + 500
        while not list(self.cell.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            assert process.poll() is None, "the study ended before it could be stopped"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=60)

    def record(self, recipe: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.output / "few" / recipe / "seed4" / "cell.json")
        return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("study"))


def test_a_stopped_training_goes_on_at_its_last_checkpoint(stopped: Stopped):
    assert stopped.first_exit_code == 1
    assert stopped.left_behind == [False, False]
    attempts = [line for _, line in read_jsonl(stopped.cell / "attempts.jsonl") if line["phase"] == "train"]
    assert [(line["event"], line.get("exit_code")) for line in attempts] == [
        ("begin", None), ("end", -signal.SIGTERM), ("begin", None), ("end", 0),
    ]  # fmt: skip
    assert attempts[0]["from"] is None
    assert attempts[2]["from"] in {f"checkpoint-{step}" for step in range(10, 60, 10)}
    steps = [payload["global_step"] for payload in read_payloads(stopped.cell / "metrics.jsonl")]
    assert steps[-1] == 60
    assert steps[0] == 1  # it was not begun anew


def test_cells_say_what_they_are_and_what_they_cost(stopped: Stopped):
    record = stopped.record("ce")
    assert (record["state"], record["steps"], record["cell"]["seed"]) == ("done", 60, 4)
    assert "--seed 4 --data_seed 4 --max_steps 60" in record["command"]
    assert set(record["readouts"]) == {"argmax/logprob", "argmax/expected_iou"}
    cost = record["cost"]
    assert 0 < cost["train_s"] < cost["train_wall_s"]
    assert cost["train_cpu_s"] > 1
    assert not cost["is_whole"]  # that of the stopped process is not known
    seen = [p["metrics"].get("train/tokens_seen") for p in read_payloads(stopped.cell / "metrics.jsonl")]
    assert cost["tokens_trained"] == max(filter(None, seen))
    assert stopped.record("untrained")["cost"]["train_s"] == 0


def test_a_failed_cell_keeps_the_end_of_its_log_and_stops_only_what_needs_it(stopped: Stopped):
    assert stopped.again.returncode == 1
    record = stopped.record("broken")
    assert record["state"] == "failed"
    assert "nowhere.json" in record["error"]
    assert "few/after_broken/seed4: not run, few/broken/seed4 failed" in stopped.again.stdout


def test_the_results_hold_every_cell_that_is_done(stopped: Stopped):
    results = read_json(stopped.output / "study.json")
    (table,) = results["tables"]
    assert [row["recipe"] for row in table["rows"]] == ["untrained", "ce"]
    assert results["states"]["few/after_broken/seed4"] == "waits"
    gain = table["rows"][1]["difference"]["untrained"]["f1_at_50"]
    f1 = {row["recipe"]: row["readouts"]["argmax/logprob"]["f1_at_50"]["mean"] for row in table["rows"]}
    assert gain["mean"] == pytest.approx(f1["ce"] - f1["untrained"])
    page = (stopped.output / "index.html").read_text(encoding="utf-8")
    assert "plain CE" in page
    assert "://" not in page.replace("http://www.w3.org", "")
    assert "| plain CE |" in (stopped.output / "study.md").read_text(encoding="utf-8")


def test_cells_that_are_done_are_not_run_again(stopped: Stopped, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    before = (stopped.cell / "attempts.jsonl").read_text(encoding="utf-8")
    assert main(["study", str(stopped.file), "--only", "recipe=ce,untrained"]) == 0
    assert (stopped.cell / "attempts.jsonl").read_text(encoding="utf-8") == before
    assert main(["study", str(stopped.file), "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = {line[0]: line[1] for line in lines if line[0].startswith("few/")}
    assert states == {
        "few/untrained/seed4": "done", "few/ce/seed4": "done", "few/broken/seed4": "failed",
        "few/after_broken/seed4": "waits",
    }  # fmt: skip


def test_another_way_to_train_is_another_cell(stopped: Stopped, monkeypatch, capsys):
    """A changed override runs the cell anew; a label does not."""
    monkeypatch.chdir(ROOT)
    text = stopped.file.read_text(encoding="utf-8")
    other = stopped.file.with_name("other.yaml")
    for old, new, state in (
        ("label: plain CE", "label: cross-entropy", "done"),
        ("steps: 60}", "steps: 61}", "changed"),
        ("logging_steps: 5}", "learning_rate: 0.001}", "changed"),
    ):
        other.write_text(text.replace(old, new), encoding="utf-8")
        assert main(["study", str(other), "--list", "--only", "recipe=ce"]) == 0
        assert state in capsys.readouterr().out
