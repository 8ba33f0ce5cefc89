"""Ranks meet over a store: they agree, differ, fail before, or do not come; afterwards the end of one ends all."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.processes import free_port

from coordexp.errors import EXIT_BAD_INPUT, ConfigError, RecordError
from coordexp.trainers.start.meeting.facts import OutputFolder, StartFacts
from coordexp.trainers.start.meeting.ranks import Ranks
from coordexp.trainers.start.meeting.store import Launch, MeetingError, launch_of


def on_nodes(meet_s: float = 20.0, size: int = 2, address: str = "127.0.0.1") -> list[Ranks]:
    """One rank on each of as many nodes, without a launcher that keeps the store."""
    port = int(free_port())
    return [
        Ranks(Launch(number, size, f"host{number}", str(number), address, port, False, "0", meet_s))
        for number in range(size)
    ]


def meet(ranks: Ranks, output: Path | None, rate: str = "0.1", *, saves: bool = True) -> str:
    """How the meeting ends for a rank: "" or the error's text."""
    launch = ranks.launch
    folder = OutputFolder(None if output is None else str(output), saves, False)

    def facts(sees_output: bool) -> StartFacts:
        return StartFacts(
            launch.rank, launch.host, launch.node, {"learning_rate": rate}, {}, {}, folder.path, sees_output
        )

    try:
        ranks.meet(facts, folder, ["/opt/plugin.py"])
    except (ConfigError, MeetingError) as error:
        return str(error)
    return ""


def together(*calls) -> list[str]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(*call) for call in calls]]


def test_equal_ranks_meet_and_leave_nothing(tmp_path):
    output = tmp_path / "new" / "out"
    first, second = on_nodes()
    assert together((meet, first, output), (meet, second, output)) == ["", ""]
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_hear_the_same_of_a_difference(tmp_path):
    first, second = on_nodes()
    ends = together((meet, first, tmp_path, "0.1"), (meet, second, tmp_path, "0.2"))
    assert ends[0] == ends[1]
    assert ends[0].startswith(
        "learning_rate: 0.2 for rank 1 on host1 (node 1), 0.1 for rank 0 on host0 (node 0)."
    )


def test_folders_that_are_not_one_are_found_out(tmp_path):
    first, second = on_nodes()
    ends = together((meet, first, tmp_path / "a"), (meet, second, tmp_path / "b"))
    assert ends[0] == ends[1]
    assert (
        f"{tmp_path / 'b'} of rank 1 on host1 (node 1) is not the folder {tmp_path / 'a'} of rank 0"
        in ends[0]
    )


def test_a_rank_that_fails_before_it_comes_is_heard(tmp_path):
    first, second = on_nodes()

    def fails(ranks: Ranks) -> str:
        ranks.failed(RecordError("train.jsonl:3: is no record."))
        return "failed"

    ends = together((meet, first, tmp_path), (fails, second))
    assert ends == ["rank 1 on host1 (node 1) failed: train.jsonl:3: is no record.", "failed"]


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path):
    first, _, third = on_nodes(meet_s=2, size=3)
    started = time.monotonic()
    ends = together((meet, first, tmp_path), (meet, third, tmp_path))
    assert time.monotonic() - started < 15
    assert ends[0].startswith("rank 1 of 3 did not come within 2 s to rank 0 on host0 (node 0).")
    assert "/opt/plugin.py (external_plugins) and the run file must be on every node" in ends[0]
    assert "rank 0" in ends[1]


def test_without_rank_0_the_others_do_not_wait_for_ever(tmp_path):
    _, second = on_nodes(meet_s=1)
    said = meet(second, tmp_path)
    assert said.startswith(
        f"rank 1 on host1 (node 1): nobody answers at 127.0.0.1:{second.launch.port}, where rank 0"
    )


def test_a_name_that_is_no_host_is_no_traceback(tmp_path):
    _, second = on_nodes(meet_s=1, address="no-such-host.invalid")
    assert "nobody answers at no-such-host.invalid" in meet(second, tmp_path)


PROGRAM = """
import sys, time
from coordexp.errors import ConfigError
from coordexp.trainers.start.meeting.facts import OutputFolder, StartFacts
from coordexp.trainers.start.meeting.ranks import Ranks
from coordexp.trainers.start.meeting.store import Launch
rank, port, deed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ranks = Ranks(Launch(rank, 2, "host", str(rank), "127.0.0.1", port, False, "0", 60.0))
ranks.meet(lambda sees: StartFacts(rank, "host", str(rank), {}, {}, {}), OutputFolder(None, False, False))
ranks.watch()
time.sleep(1)  # until both do
if deed == "fails":
    ranks.failed(ConfigError("no weights in /model."))
    raise SystemExit(2)
if deed == "trains":
    ranks.over()
    time.sleep(2.5)
    raise SystemExit(0)
time.sleep(60)
"""


def start(rank: int, port: str, deed: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(rank), port, deed]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_one_that_waits(failing):
    """The one that waits may be in a collective, where no exception reaches it."""
    port = free_port()
    ranks = [start(number, port, "fails" if number == failing else "waits") for number in range(2)]
    said = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    told = f"coordexp: rank {failing} on host (node {failing}) failed: no weights in /model.\n"
    assert told in said[1 - failing][1]


@pytest.mark.slow
def test_training_is_not_watched():
    port = free_port()
    ranks = [start(number, port, "trains") for number in range(2)]
    said = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said


def test_what_launchers_say():
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    found = launch_of(torchrun)
    assert (found.rank, found.size, found.node, found.address, found.port) == (3, 4, "1", "10.0.0.1", 29500)
    assert (found.has_store, found.attempt, found.meet_s) == (True, "2", 60.0)
    assert launch_of({}) is None
    assert launch_of({**torchrun, "WORLD_SIZE": "1"}) is None
    by_hand = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "COORDEXP_MEET_S": "300",
    }
    found = launch_of(by_hand)
    assert (found.has_store, found.node, found.meet_s) == (False, "", 300.0)
