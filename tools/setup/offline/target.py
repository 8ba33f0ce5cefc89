"""The machine that wheels are collected for: its Python, its platform, and what it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from offline import OfflineError

PYTHONS = ("3.11", "3.12")
ARCHITECTURES = ("x86_64", "aarch64")
_LEGACY = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
_HAVE_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*===?\s*([^\s;#]+)")
_URL_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*@\s*(\S+)")


@dataclass(frozen=True)
class Target:
    """python: "3.12".  glibc: the minor version N of the machine's glibc 2.N (`ldd --version`)."""

    python: str
    architecture: str = "x86_64"
    glibc: int = 35

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platform tags of wheels that run there; the oldest first, so that it is preferred."""
        tags: list[str] = []
        for minor in (5, 12, *range(17, self.glibc + 1)):
            tags += [f"{_LEGACY[minor]}_{self.architecture}"] if minor in _LEGACY else []
            tags.append(f"manylinux_2_{minor}_{self.architecture}")
        return (*tags, f"linux_{self.architecture}")

    @property
    def markers(self) -> dict[str, str]:
        """What environment markers of dependencies see there (pip would show them this Python instead)."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.9",
            "os_name": "posix",
            "platform_machine": self.architecture,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.9",
            "python_version": self.python,
            "sys_platform": "linux",
        }

    def wants(self, requirement: Requirement, extra: str = "") -> bool:
        """Whether a dependency counts there, for those who asked for `extra`."""
        return requirement.marker is None or requirement.marker.evaluate({**self.markers, "extra": extra})

    def takes(self, file_name: str) -> bool:
        """Whether a wheel without compiled parts runs there."""
        interpreters = {"py3", "py" + self.python.replace(".", "")}
        tags = parse_wheel_filename(file_name)[3]
        return any(
            tag.abi == "none" and tag.platform == "any" and tag.interpreter in interpreters for tag in tags
        )


def read_have(path: Path) -> dict[NormalizedName, Version]:
    """What a machine has, from its `pip freeze` or `pip list --format=freeze`. Raises OfflineError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OfflineError(f"{path}: cannot be read ({error}).") from None
    have: dict[NormalizedName, Version] = {}
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", "--")):
            name, version = _have_line(stripped, f"{path}:{number}")
            have[name] = version
    if not have:
        raise OfflineError(f"{path}: names no package; expected the output of `pip list --format=freeze`.")
    return have


def _have_line(line: str, where: str) -> tuple[NormalizedName, Version]:
    text = ""
    if (pinned := _HAVE_LINE.match(line)) is not None:
        name, text = pinned.groups()
    elif (placed := _URL_LINE.match(line)) is not None:
        name = placed.group(1)
        file_name = placed.group(2).split("#")[0].rsplit("/", 1)[-1].replace("%2B", "+")
        text = str(parse_wheel_filename(file_name)[1]) if file_name.endswith(".whl") else ""
    try:
        return canonicalize_name(name if text else ""), Version(text)
    except InvalidVersion:
        raise OfflineError(
            f"{where}: {line[:80]!r} does not say name==version. Write the list there with "
            "`python -m pip list --format=freeze`, which always does."
        ) from None


def read_lock(path: Path) -> dict[NormalizedName, Version]:
    """Versions that work together (`constraints.txt`), by name."""
    found: Mapping[str, str] = dict(
        line.split("==", 1)
        for line in path.read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    return {canonicalize_name(name): Version(version.strip()) for name, version in found.items()}
