"""Look at the machine, judge what was seen, report it.

report = examine(Asked())
print(report)
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordexp.data.store.place import cache_folder
from coordexp.errors import EXIT_FAILURE, EXIT_OK
from coordexp.machine.facts import MachineFacts
from coordexp.machine.findings import MachineFinding, Severity
from coordexp.machine.gather.answers import gather_answers
from coordexp.machine.gather.devices import gather_devices
from coordexp.machine.gather.packages import gather_packages
from coordexp.machine.gather.places import gather_hub, gather_memory, gather_places, gather_ports, hub_folder
from coordexp.machine.gather.ranks import gather_ranks, world_size
from coordexp.machine.judge.software import judge_answers, judge_devices, judge_packages, judge_ranks
from coordexp.machine.judge.surroundings import (
    judge_hub,
    judge_memory,
    judge_places,
    judge_ports,
    judge_temporary,
    unasked,
)

MASTER_PORT = 29500
"""Where torchrun's ranks meet unless MASTER_PORT says otherwise."""
SERVER_PORTS = ((8000, "rollout server"), (51216, "weights of a rollout server"))
WANTED_BYTES = {"checkpoint": 60 * 10**9, "model": 10 * 10**9, "records": 2 * 10**9}
"""Of a 4B model: a checkpoint with optimizer state in float32 beside bfloat16 weights, the weights alone."""
_ORDER = list(Severity)


@dataclass(frozen=True)
class Asked:
    """output: where runs are to be written.  ports: that a rollout server is to have; empty looks at the usual ones.
    answers: whether backends are to generate.
    """

    output: Path = Path("runs")
    ports: tuple[int, ...] = ()
    answers: bool = True


@dataclass(frozen=True)
class Report:
    """findings: worst first."""

    facts: MachineFacts
    findings: tuple[MachineFinding, ...]

    @property
    def exit_code(self) -> int:
        """1 where something will fail."""
        bad = any(finding.severity is Severity.ERROR for finding in self.findings)
        return EXIT_FAILURE if bad else EXIT_OK

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        summary = ", ".join(f"{counts[severity]} {severity}" for severity in _ORDER if counts[severity])
        return "\n".join([f"{self.facts.host}: {summary}", *map(str, self.findings)])

    def to_json(self) -> dict[str, Any]:
        """As JSON values; paths as text."""
        return {
            "host": self.facts.host,
            "exit_code": self.exit_code,
            "findings": [finding.to_json() for finding in self.findings],
            "facts": asdict(self.facts),
        }


def examine(asked: Asked) -> Report:
    """Takes a minute or two, most of it for the backends. Under a launcher all ranks call it, and rank 0 reports."""
    facts = gather(asked)
    return Report(facts, judge(facts))


def gather(asked: Asked) -> MachineFacts:
    """Look at everything."""
    packages = gather_packages()
    ranks = gather_ranks(packages.versions)
    temporary = Path(tempfile.gettempdir())
    return MachineFacts(
        host=socket.gethostname(),
        packages=packages,
        devices=gather_devices(),
        ranks=ranks,
        ports=gather_ports(list(_ports(asked.ports))),
        places=gather_places(_places(asked.output, temporary)),
        memory=gather_memory(),
        hub=gather_hub(),
        temporary=temporary,
        answers=gather_answers() if asked.answers else (),
    )


def _ports(named: Sequence[int]) -> Iterator[tuple[int, str, bool]]:
    if world_size() == 1:  # a launcher has the port already
        of_ranks = os.environ.get("MASTER_PORT")
        yield int(of_ranks or MASTER_PORT), "MASTER_PORT", of_ranks is not None
    for port in named:
        yield port, "rollout server", True
    if not named:
        yield from ((port, use, False) for port, use in SERVER_PORTS)


def _places(output: Path, temporary: Path) -> list[tuple[str, Path, int]]:
    return [
        ("runs", output, WANTED_BYTES["checkpoint"]),
        ("checked records (COORDEXP_CACHE)", cache_folder(), WANTED_BYTES["records"]),
        ("models (HF_HOME)", hub_folder(), WANTED_BYTES["model"]),
        ("temporary files (TMPDIR)", temporary, WANTED_BYTES["records"]),
    ]


def judge(facts: MachineFacts) -> tuple[MachineFinding, ...]:
    """All findings, the worst first."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    findings = [
        *judge_packages(facts.packages),
        *judge_devices(facts.devices, facts.packages.torch_cuda),
        *judge_ranks(facts.ranks, len(facts.devices.gpus)),
        *(judge_answers(facts.answers) or [unasked("generate", "--quick")]),
        *judge_ports(facts.ports),
        *judge_places(facts.places),
        *judge_memory(facts.memory, ranks_here),
        judge_hub(facts.hub),
        judge_temporary(facts.temporary),
    ]
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
