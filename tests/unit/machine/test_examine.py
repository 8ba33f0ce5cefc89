"""`coordexp doctor --machine` on this machine, and what it gathers against what the system says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support.processes import free_port, run_coordexp

from coordexp.cli.main import main
from coordexp.machine.gather.answers import gather_answers
from coordexp.machine.gather.places import gather_memory, gather_places, gather_ports
from coordexp.swift_bridge.versions import PYTHONS, RELEASES

PAGE = Path(__file__).parents[3] / "runbooks" / "machine.md"


@pytest.mark.slow
def test_the_command_on_this_machine(tmp_path: Path):
    """All of it but vLLM: the report as JSON, a taken port that was asked for, a folder that is a file."""
    answers = gather_answers(limits_s={"hf": 500.0})
    assert [(one.backend, one.state, len(one.tokens)) for one in answers] == [("hf", "answered", 12)], answers
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_coordexp(
            "doctor", "--machine", "--json", "--quick", "--output", tmp_path / "runs", "--port", port
        )
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 1, done.stderr
    errors = [found for found in report["findings"] if found["severity"] == "error"]
    assert [found["check"] for found in errors] == ["ports"]
    assert str(port) in errors[0]["seen"]
    seen = {found["check"]: found["seen"] for found in report["findings"]}
    assert seen["hub"].startswith("HF_HUB_OFFLINE is set")
    assert seen["folder of runs"].startswith(str(tmp_path))
    assert report["facts"]["packages"]["versions"]["ms-swift"].startswith("4.6")
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_ranks_meet():
    """Under torchrun: rank 0 alone reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(),
               "-m", "coordexp.cli.main", "doctor", "--machine", "--quick"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fine: ranks: 2 ranks on 1 host met over gloo") == 1
    assert "MASTER_PORT" not in done.stdout  # torchrun itself listens there


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["doctor"], "name the output folder of a run"),
        (["doctor", "runs/a", "--machine"], "takes no RUN_DIR"),
        (["doctor", "runs/a", "--quick"], "--quick belongs to --machine"),
        (["doctor", "--machine", "--port", "70000"], "ports end at 65535"),
    ],
)
def test_bad_use(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_places_are_measured_and_left_as_they_were(tmp_path: Path):
    inside = tmp_path / "not" / "there"
    found = gather_places([("runs", inside, 5), ("cache", tmp_path, 7)], probe_bytes=1 << 20)
    assert [(one.use, one.folder, one.wanted_bytes) for one in found] == [("runs, cache", tmp_path, 12)]
    assert found[0].error is None
    assert found[0].bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []
    proc = gather_places([("runs", Path("/proc/self"), 0)], probe_bytes=1 << 20)[0]
    assert proc.error
    assert proc.bytes_per_s == 0.0


def test_a_port_is_taken_while_somebody_listens():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        taken = gather_ports([(port, "a", True)])[0]
    assert taken.error == "Address already in use"
    assert gather_ports([(port, "a", True)])[0].error is None


def test_limits_of_control_groups(tmp_path: Path):
    group = tmp_path / "group"
    group.mkdir()
    free = gather_memory(shared=tmp_path / "none", group=group)
    assert (free.shared_bytes, free.limit_bytes, free.used_bytes) == (None, None, None)
    (group / "memory.max").write_text("4000000\n")
    (group / "memory.current").write_text("1000000\n")
    (group / "cpu.max").write_text("50000 100000\n")
    limited = gather_memory(shared=tmp_path, group=group)
    assert (limited.limit_bytes, limited.used_bytes, limited.cores) == (4_000_000, 1_000_000, 0.5)
    (group / "memory.max").write_text("max\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert gather_memory(group=group).limit_bytes is None


def test_a_backend_that_hangs_is_ended():
    late = gather_answers(limits_s={"hf": 0.05})
    assert [(one.state, one.seconds) for one in late] == [("too late", 0.05)]


def test_it_starts_without_what_it_is_to_find_missing():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'swift', 'vllm', 'datasets', 'transformers')));"
    code = f"{blocked} import coordexp.machine.report.examine as e; print(e.gather_devices().error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("torch does not import"), done.stderr


def test_the_page_holds_the_table_of_releases():
    page = PAGE.read_text(encoding="utf-8")
    for package, releases in RELEASES.items():
        assert f"| {package} | {releases.bounds} | {', '.join(releases.run) or 'none'} |" in page


def test_pip_is_told_the_same_bounds():
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}
    for package in ("torch", "torchvision", "transformers", "ms-swift"):
        assert asked[package] == SpecifierSet(RELEASES[package].bounds)
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(PYTHONS.bounds)
