"""Wheels on the disk, and pip as the one who brings them there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from offline import OfflineError
from offline.target import Target

_UNMATCHED = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)")


@dataclass(frozen=True)
class Wheel:
    """A wheel file. source: it was built here, from a source archive."""

    path: Path
    source: bool = False

    @cached_property
    def _parsed(self) -> tuple[NormalizedName, Version]:
        return parse_wheel_filename(self.path.name)[:2]

    @property
    def name(self) -> NormalizedName:
        return self._parsed[0]

    @property
    def version(self) -> Version:
        return self._parsed[1]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @cached_property
    def requires(self) -> tuple[Requirement, ...]:
        """Its dependencies with their markers. Raises OfflineError for a file that is no wheel."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                name = next(
                    n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1
                )
                text = archive.read(name).decode("utf-8")
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise OfflineError(f"{self.path}: is no wheel ({error}). Delete it and start again.") from None
        return tuple(map(Requirement, HeaderParser().parsestr(text).get_all("Requires-Dist") or ()))


@dataclass
class PipSource:
    """Wheels for a target from the index that pip is configured for, kept in `pool`.

    Where there is no wheel but a source archive, it is built without a compiler: what comes out runs on any machine.
    """

    pool: Path
    target: Target
    build: bool = True
    reasons: dict[NormalizedName, str] = field(default_factory=dict)
    """Why a package could not be had."""
    _built: set[str] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)

    def fetch(self, wanted: Sequence[Requirement]) -> dict[NormalizedName, Wheel]:
        """A wheel for each; one that is missing has its reason in `reasons`."""
        self._download_missing(wanted)
        pooled = [(canonicalize_name(requirement.name), self._pooled(requirement)) for requirement in wanted]
        return {name: wheel for name, wheel in pooled if wheel is not None}

    def add(self, path: Path) -> Wheel:
        """Put a wheel from elsewhere into the pool."""
        self._built.add(path.name)
        return Wheel(Path(shutil.move(path, self.pool / path.name)), source=True)

    def _pooled(self, requirement: Requirement) -> Wheel | None:
        """The newest in the pool that meets it."""
        found: list[Wheel] = []
        for path in self.pool.glob("*.whl"):
            try:
                wheel = Wheel(path, source=path.name in self._built)
                name = wheel.name
            except InvalidWheelFilename:
                raise OfflineError(f"{path}: the index gave a file that is no wheel.") from None
            if name == canonicalize_name(requirement.name):
                found.append(wheel)
        fitting = [w for w in found if requirement.specifier.contains(w.version, prereleases=True)]
        return max(fitting, key=lambda wheel: wheel.version, default=None)

    def _download(self, wanted: Sequence[Requirement]) -> None:
        done = self._pip(
            "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(self.pool),
            "--implementation", "cp", "--python-version", self.target.python,
            *(part for platform in self.target.platforms for part in ("--platform", platform)),
            *(f"{requirement.name}{requirement.specifier}" for requirement in wanted),
        )  # fmt: skip
        if done.returncode == 0:
            return
        named = _UNMATCHED.search(done.stderr)
        culprit = canonicalize_name(named.group(1)) if named else ""
        missing = [r for r in wanted if canonicalize_name(r.name) == culprit] or list(wanted)
        if len(missing) == 1:
            self._from_source(missing[0], _last_error(done.stderr))
            self._download_missing([r for r in wanted if r is not missing[0]])
        else:  # pip names none of them: look for it
            half = len(wanted) // 2
            self._download_missing(wanted[:half])
            self._download_missing(wanted[half:])

    def _download_missing(self, wanted: Sequence[Requirement]) -> None:
        missing = [r for r in wanted if str(r) not in self._failed and self._pooled(r) is None]
        if missing:
            self._download(missing)

    def _from_source(self, requirement: Requirement, why: str) -> None:
        name = canonicalize_name(requirement.name)
        self._failed.add(str(requirement))  # unless its source builds, which puts it into the pool
        if not self.build:
            self.reasons[name] = f"no wheel ({why})"
            return
        folder = self.pool / "built"
        done = self._pip(
            "wheel", "--quiet", "--no-deps", "--no-cache-dir", "--no-binary", requirement.name,
            "--wheel-dir", str(folder), f"{requirement.name}{requirement.specifier}",
            CC="/bin/false", CXX="/bin/false",
        )  # fmt: skip
        for path in sorted(folder.glob("*.whl")):
            if done.returncode == 0 and self.target.takes(path.name):
                self.add(path)
            else:
                self.reasons[name] = "no wheel for this target, and its source has compiled parts"
                path.unlink()
        if done.returncode != 0:
            self.reasons[name] = (
                f"no wheel for this target ({why}), and its source does not build without a compiler"
            )

    def _pip(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip


def project_wheel(project: Path, folder: Path) -> Path:
    """The wheel of a project, built from a copy of its files, so that nothing is left among them."""
    copy = folder / "project"
    shutil.copytree(project, copy, ignore=_only_sources)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--wheel-dir", str(folder), str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(copy)
    if done.returncode != 0:
        raise OfflineError(f"{project}: its wheel does not build: {_last_error(done.stderr)}")
    return next(folder.glob("*.whl"))


def _only_sources(folder: str, names: list[str]) -> set[str]:
    top = (Path(folder) / "pyproject.toml").is_file()
    kept = {"pyproject.toml", "README.md", "LICENSE", "coordexp", "configs", "runbooks"}
    return {name for name in names if (top and name not in kept) or name == "__pycache__"}


def _last_error(stderr: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return (lines or stderr.splitlines() or ["pip failed without a word"])[-1].strip()
