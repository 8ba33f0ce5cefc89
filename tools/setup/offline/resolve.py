"""Which version of which package: what the machine has where that will do, the locked version else.

A walk over the dependencies for the target's Python. It looks for no other solution where versions contradict each
other; it says so. pip itself cannot do this for another Python: its markers are those of the Python it runs in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from offline.target import Target
from offline.wheels import Wheel

NEVER_REPLACED = frozenset(map(canonicalize_name, ("torch", "torchvision", "torchaudio", "triton")))
"""Builds of these belong to the machine's driver: where it has one, no other is collected."""
PROJECT = "coordexp"


class Source(Protocol):
    """Where wheels come from."""

    reasons: dict[NormalizedName, str]

    def fetch(self, wanted: Sequence[Requirement]) -> dict[NormalizedName, Wheel]:
        """A wheel for each that can be had."""


class TooLargeError(Exception):
    """The wheels so far are over the limit."""


@dataclass(frozen=True)
class Conflict:
    """`by` asks for `asked`, and `name` is at `version`. fixed: because the machine has that, and keeps it."""

    by: str
    asked: str
    name: str
    version: str
    fixed: bool

    def __str__(self) -> str:
        has = "the machine has" if self.fixed else "chosen is"
        return f"{self.by} asks for {self.asked}, and {has} {self.name} {self.version}"


@dataclass
class Resolution:
    """kept: from the machine.  replaced: the machine's version, of packages that the folder brings another of.
    missing: package -> (who asks for it, why it could not be had).
    """

    wheels: dict[NormalizedName, Wheel] = field(default_factory=dict)
    asked_by: dict[NormalizedName, str] = field(default_factory=dict)
    kept: dict[NormalizedName, Version] = field(default_factory=dict)
    replaced: dict[NormalizedName, Version] = field(default_factory=dict)
    missing: dict[NormalizedName, tuple[str, str]] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all wheels."""
        return sum(wheel.size for wheel in self.wheels.values())


class _AgainError(Exception):
    """A choice did not hold; what was learnt makes the next walk choose otherwise."""


@dataclass
class Resolver:
    """have: what the machine has.  lock: versions that work together.  excluded: never to be collected."""

    source: Source
    target: Target
    have: Mapping[NormalizedName, Version]
    lock: Mapping[NormalizedName, Version]
    excluded: frozenset[NormalizedName] = frozenset()
    _unfit: set[NormalizedName] = field(default_factory=set)
    _bounds: dict[NormalizedName, SpecifierSet] = field(default_factory=dict)

    def resolve(self, roots: Iterable[Requirement], *, limit: int | None = None) -> Resolution:
        """Everything that `roots` need. Raises TooLargeError once the wheels are over `limit` bytes."""
        wanted = list(roots)
        while True:
            try:
                return self._walk(wanted, limit)
            except _AgainError:
                continue

    def _walk(self, roots: list[Requirement], limit: int | None) -> Resolution:
        found = Resolution()
        extras: dict[NormalizedName, set[str]] = {}
        wave = [(root, PROJECT) for root in roots if self.target.wants(root)]
        while wave:
            asked: dict[NormalizedName, tuple[SpecifierSet, str]] = {}
            opened: list[tuple[NormalizedName, str]] = []
            for requirement, by in wave:
                name = canonicalize_name(requirement.name)
                if name in self.excluded:
                    continue
                new = requirement.extras - extras.setdefault(name, set())
                extras[name] |= new
                opened += [(name, extra) for extra in new]
                if name in found.wheels or name in found.kept:
                    self._hold(found, name, requirement, by)
                elif name not in found.missing:
                    bounds, first_by = asked.get(name, (self._bounds.get(name, SpecifierSet()), by))
                    asked[name] = (bounds & requirement.specifier, first_by)
            fresh = self._choose(found, asked)
            if limit is not None and found.size > limit:
                raise TooLargeError
            opened += [(name, "") for name in fresh]
            wave = [pair for name, extra in opened for pair in self._dependencies(found, name, extra)]
        return found

    def _choose(
        self, found: Resolution, asked: Mapping[NormalizedName, tuple[SpecifierSet, str]]
    ) -> list[NormalizedName]:
        """Settle every name that is new; those that come as wheels."""
        wanted: list[Requirement] = []
        for name, (bounds, by) in asked.items():
            found.asked_by[name] = by
            version = self.have.get(name)
            if version is not None and name in NEVER_REPLACED:
                found.kept[name] = version
                self._hold(found, name, Requirement(f"{name}{bounds}"), by)
            elif (
                version is not None and name not in self._unfit and bounds.contains(version, prereleases=True)
            ):
                found.kept[name] = version
            else:
                wanted.append(Requirement(f"{name}{self._narrowed(name, bounds)}"))
                if version is not None:
                    found.replaced[name] = version
        wheels = self.source.fetch(wanted)
        found.wheels |= wheels
        for requirement in wanted:
            name = canonicalize_name(requirement.name)
            if name not in wheels:
                found.missing[name] = (asked[name][1], self.source.reasons.get(name, "it could not be had"))
                found.replaced.pop(name, None)
        return list(wheels)

    def _narrowed(self, name: NormalizedName, bounds: SpecifierSet) -> SpecifierSet:
        """One version where it is known which; what is asked for, else."""
        torch = self.have.get(canonicalize_name("torch"))
        if name == "torchvision" and torch is not None:
            return SpecifierSet(f"==0.{torch.minor + 15}.*")  # torchvision 0.(N + 15) is built for torch 2.N
        locked = self.lock.get(name)
        return (
            SpecifierSet(f"=={locked}")
            if locked is not None and bounds.contains(locked, prereleases=True)
            else bounds
        )

    def _hold(self, found: Resolution, name: NormalizedName, requirement: Requirement, by: str) -> None:
        """A choice against one more demand: it holds, the walk starts again, or a conflict is noted."""
        version = found.kept.get(name) or found.wheels[name].version
        if requirement.specifier.contains(version, prereleases=True):
            return
        fixed = name in found.kept and name in NEVER_REPLACED
        bounds = self._bounds.get(name, SpecifierSet())
        learnt = bounds & requirement.specifier
        if name in found.kept and not fixed:
            self._unfit.add(name)
            raise _AgainError
        if not fixed and learnt != bounds:
            self._bounds[name] = learnt
            raise _AgainError
        found.conflicts.append(Conflict(by, str(requirement), str(name), str(version), fixed))

    def _dependencies(
        self, found: Resolution, name: NormalizedName, extra: str
    ) -> Iterator[tuple[Requirement, str]]:
        if name not in found.wheels:
            return
        for requirement in found.wheels[name].requires:
            always = self.target.wants(requirement)
            if always if not extra else (not always and self.target.wants(requirement, extra)):
                yield requirement, str(name)
