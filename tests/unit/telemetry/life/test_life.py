"""Signs of life of real processes, and what is left of those that end badly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from coordexp.files import append_jsonl
from coordexp.metrics.payload import build_payload
from coordexp.telemetry.life.beats import FAILED, TRAINED, RankEnd, beat_file, read_beats
from coordexp.telemetry.life.postmortem import last_payloads

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from coordexp.telemetry.life.keeper import RankLife
life = RankLife(Path(sys.argv[1]), rank=int(sys.argv[2]), world_size=2, every_s=0.05)
life.start()
life.does("training")
life.at(7)
life.judged([{"rule": "truncated", "step": 7}])
def waits_for_other_ranks():
    while True:
        time.sleep(60)
"""
ENDS = {
    "signal": "print('ready', flush=True)\nwaits_for_other_ranks()",
    "exception": "raise RuntimeError('no memory')",
    "early exit": "sys.exit(0)",
    "trained": "life.ends('trained')\nlife.stop()\nlife.ends('failed', 'too late')",
    "broke off once": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    life.fails(error)\n    raise",
    "a worker gets the signal": "pid = os.fork()\nif pid == 0:\n    waits_for_other_ranks()\ntime.sleep(0.2)\n"
    "os.kill(pid, signal.SIGTERM)\n_, status = os.waitpid(pid, 0)\nassert os.WTERMSIG(status) == signal.SIGTERM\n"
    "time.sleep(0.3)\nlife.ends('trained')",
    "hooks go back": "hook = sys.excepthook\nlife.stop()\nassert sys.excepthook is sys.__excepthook__ is not hook\n"
    "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\nassert signal.set_wakeup_fd(-1) == -1",
}


def start(folder, end, rank=0):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + ENDS[end], str(folder), str(rank)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder, end, rank=0):
    """Exit code and standard error of a process, and what it said last."""
    process = start(folder, end, rank)
    _, error = process.communicate(timeout=60)
    return process.returncode, error, {beat.rank: beat for beat in read_beats(folder)}[rank]


def test_a_process_that_waits_says_so_and_where_when_it_is_ended(tmp_path):
    process = start(tmp_path, "signal")
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    first = read_beats(tmp_path)[0]
    while (beat := read_beats(tmp_path)[0]).time == first.time or beat.step != 7:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (beat.rank, beat.world_size, beat.pid, beat.doing) == (0, 2, process.pid, "training")
    assert beat.end is None
    assert beat.time > beat.step_time
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.communicate()
    (beat,) = read_beats(tmp_path)
    assert (beat.end.how, beat.end.reason) == (FAILED, "signal SIGTERM")
    assert "in waits_for_other_ranks" in beat.end.stack
    postmortem = json.loads((tmp_path / "postmortem.json").read_text())
    assert (postmortem["rank"], postmortem["reason"], postmortem["step"]) == (0, "signal SIGTERM", 7)
    assert postmortem["rules"] == [{"rule": "truncated", "step": 7}]


def test_an_exception_leaves_its_stack_and_the_last_records(tmp_path):
    for step in range(1, 8):
        append_jsonl(tmp_path / "metrics.jsonl", build_payload("train", step, {"loss": float(step)}))
    code, error, beat = run(tmp_path, "exception")
    assert code == 1
    assert error.count("RuntimeError: no memory") == 1  # the traceback is still printed
    assert (beat.end.how, beat.end.reason) == (FAILED, "RuntimeError: no memory")
    postmortem = json.loads((tmp_path / "postmortem.json").read_text())
    assert [payload["global_step"] for payload in postmortem["last_payloads"]] == [3, 4, 5, 6, 7]
    assert postmortem["stack"][-1] == "RuntimeError: no memory"
    assert [one["rank"] for one in postmortem["ranks"]] == [0]


def test_the_rank_that_broke_off_first_is_the_cause(tmp_path):
    run(tmp_path, "exception", rank=1)
    run(tmp_path, "early exit", rank=0)
    postmortem = json.loads((tmp_path / "postmortem.json").read_text())
    assert (postmortem["rank"], postmortem["reason"]) == (1, "RuntimeError: no memory")
    assert [one["end"]["reason"] for one in postmortem["ranks"]] == [
        "the process ended before training was over",
        "RuntimeError: no memory",
    ]


@pytest.mark.parametrize(
    ("end", "code", "expected"),
    [
        ("early exit", 0, RankEnd(FAILED, "the process ended before training was over")),
        ("trained", 0, RankEnd(TRAINED)),
        ("a worker gets the signal", 0, RankEnd(TRAINED)),
        ("hooks go back", 0, None),
    ],
)
def test_ends_without_an_error(tmp_path, end, code, expected):
    found, error, beat = run(tmp_path, end)
    assert (found, beat.end) == (code, expected), error
    assert (tmp_path / "postmortem.json").exists() is (expected is not None and expected.how == FAILED)


def test_the_first_end_counts_and_a_new_attempt_sets_the_old_one_aside(tmp_path):
    _, _, beat = run(tmp_path, "broke off once")
    assert beat.end.reason == "ZeroDivisionError: division by zero"
    beat_file(tmp_path, 5).write_text(beat_file(tmp_path, 0).read_text().replace('"rank": 0', '"rank": 5'))
    _, _, beat = run(tmp_path, "trained")
    assert beat.end == RankEnd(TRAINED)
    assert [one.rank for one in read_beats(tmp_path)] == [0]  # an earlier attempt had more ranks
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ranks", "postmortem_before.json"}


def test_last_payloads_pass_over_what_is_no_payload(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_payloads(path) == []
    append_jsonl(path, {"record": "run_meta"})
    append_jsonl(path, build_payload("eval", 3, {"eval_loss": 1.0}))
    with path.open("a") as stream:
        stream.write('{"schema_version": 1, "mo')
    assert [payload["global_step"] for payload in last_payloads(path)] == [3]
