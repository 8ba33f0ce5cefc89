"""Installed versions, and whether what they ask of each other is there."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from coordexp.machine.facts import PackageFacts
from coordexp.swift_bridge.versions import RELEASES

LEFT_OUT = ("torchaudio", "torchcodec")
"""`make setup` removes them beside vLLM: nothing here needs them, and their CUDA builds break a CPU's transformers."""


def gather_packages() -> PackageFacts:
    """Of this environment."""
    found = {package: _found(package) for package in RELEASES}
    versions = {package: None if one is None else one.version for package, one in found.items()}
    present = [one for one in found.values() if one is not None]
    return PackageFacts(
        platform.python_version(), versions, _torch_cuda(versions["torch"]), tuple(_broken(present))
    )


def _found(package: str) -> Distribution | None:
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None


def _torch_cuda(version: str | None) -> str | None:
    if version is None:
        return None
    import torch

    cuda: str | None = torch.version.cuda
    return cuda


def _broken(distributions: Iterable[Distribution]) -> Iterator[str]:
    """Demands of these packages that are not met."""
    for one in distributions:
        for requirement in map(Requirement, one.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            asked = f"{one.name} {one.version} asks for {requirement.name}{requirement.specifier}"
            other = _found(canonicalize_name(requirement.name))
            if other is None and requirement.name not in LEFT_OUT:
                yield f"{asked}, which is not installed"
            elif other is not None and not requirement.specifier.contains(other.version, prereleases=True):
                yield f"{asked}, and {other.version} is installed"
