"""run.log of processes of their own: what is in it, what the console shows, attempts, and a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COORDEXP = Path(__file__).resolve().parents[3]

PROGRAM = """
import logging, os, subprocess, sys, warnings
from coordexp.telemetry import run_log
run_log.start(int(os.environ.get("RANK", "0")))
print("before the folder is known")
of_run = {"command": "swift sft", "resumed_from": os.environ.get("FROM")}
run_log.open_in(sys.argv[1], **of_run, has_header="RANK" not in os.environ)
"""


def run(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + program, str(folder)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(COORDEXP), **environment}, timeout=60,
    )  # fmt: skip


SAYS = """
print("a print")
logging.getLogger("elsewhere").error("a library's error")
warnings.warn("a warning")
os.write(1, b"from C\\n")
subprocess.run(["sh", "-c", "echo from a child; echo its error >&2"])
sys.stderr.write("bar 1/3\\rbar 2/3\\r"); sys.stderr.flush(); sys.stderr.write("bar 3/3\\n")
print("\\x1b[1;31mred\\x1b[0m and \\x1b[2Kplain", flush=True)
sys.stdout.write("no line break"); sys.stdout.flush()
"""


def test_everything_is_in_the_file_and_on_the_console(tmp_path):
    done = run(tmp_path, SAYS)
    assert done.returncode == 0
    console = done.stdout.splitlines()  # of pipes, a print waits longer than what comes from C
    coloured = "\x1b[1;31mred\x1b[0m and \x1b[2Kplain"
    expected = ["before the folder is known", "a print", "from C", "from a child", coloured, "no line break"]
    assert sorted(console) == sorted(expected)
    assert "bar 1/3\nbar 2/3\nbar 3/3\n" in done.stderr  # read as text: \r is a line break too
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[0].startswith("======== attempt 1 · ")
    assert lines[1] == "command: swift sft"
    expected = {
        "before the folder is known", "a print", "a library's error", "from C", "from a child", "its error", "bar 3/3",
        "no line break", "red and plain",
    }  # fmt: skip
    assert expected <= set(lines)
    assert any("UserWarning: a warning" in line for line in lines)
    assert not any("bar 1/3" in line for line in lines)


def test_attempts_follow_one_another(tmp_path):
    run(tmp_path, "print('one')")
    run(tmp_path, "print('two')", FROM="checkpoint-3")
    lines = [line.split(" · ")[0] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert lines == [
        "======== attempt 1", "command: swift sft", "before the folder is known", "one",
        "======== attempt 2", "command: swift sft", "resumed from: checkpoint-3", "before the folder is known", "two",
    ]  # fmt: skip


def test_of_another_rank_its_errors(tmp_path):
    run(tmp_path, "print('a print')\nraise ValueError('broken')", RANK="1")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines[-1] == "[rank 1] ValueError: broken"
    assert all(line.startswith("[rank 1] ") for line in lines)
    assert not any("a print" in line for line in lines)


def test_a_killed_process_has_its_last_words_in_it(tmp_path):
    program = "print('last words', flush=True)\nos.kill(os.getpid(), 9)"
    assert run(tmp_path, program).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while "last words\n" not in (tmp_path / "run.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_folder_nothing_is_written(tmp_path):
    program = PROGRAM.partition("of_run")[0] + "raise SystemExit(2)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(COORDEXP)}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "before the folder is known\n")
    assert list(tmp_path.iterdir()) == []
