"""Which parts go into the folder: in their order, as long as they fit and nothing contradicts what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offline import OfflineError
from offline.parts import CORE, ORDER, Part
from offline.resolve import Resolution, Resolver, TooLargeError

MB = 1_000_000


@dataclass
class Choice:
    """parts: those that are in.  left_out: part or package -> why it is not, in one sentence."""

    resolution: Resolution
    parts: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def choose(resolver: Resolver, parts: Sequence[Part], *, max_mb: float | None = None) -> Choice:
    """Resolve part after part. Raises OfflineError where the core does not fit or cannot be had."""
    limit = None if max_mb is None else int(max_mb * MB)
    choice = Choice(Resolution())
    roots = []
    for part in parts:
        try:
            found = resolver.resolve([*roots, *part.roots], limit=limit)
        except TooLargeError:
            sentence = f"it does not fit into --max-mb {max_mb:g}"
            if part.name == CORE:
                raise OfflineError(
                    f"The core: {sentence}. Give more room; nothing runs without it."
                ) from None
            choice.left_out[part.name] = f"{sentence} beside {', '.join(choice.parts)}"
            continue
        problems = [str(conflict) for conflict in found.conflicts]
        if part.name == CORE:
            problems += [f"{name} (for {by}): {why}" for name, (by, why) in found.missing.items()]
            if problems:
                raise OfflineError(f"The core cannot be collected: {'; '.join(problems)}. {_advice(found)}")
        elif problems:
            choice.left_out[part.name] = "; ".join(problems)
            continue
        choice.resolution = found
        choice.parts.append(part.name)
        roots += part.roots
    for name, (by, why) in choice.resolution.missing.items():
        choice.left_out[str(name)] = f"{by} asks for it; {why}"
    return choice


def _advice(found: Resolution) -> str:
    if any(conflict.fixed for conflict in found.conflicts):
        return (
            "Builds of torch and its kin are not replaced where the machine has them: install the version asked for "
            "there, or take these lines out of the list, and they are collected too."
        )
    return "Use another --python, or an index that has them."


def summary(choice: Choice, resolver: Resolver) -> list[str]:
    """What was chosen and why, a sentence a line."""
    found = choice.resolution
    lines = [f"{name}: {ORDER[name]}" for name in choice.parts]
    lines.append(f"{len(found.wheels)} wheels, {found.size / MB:.1f} MB.")
    if found.kept:
        lines.append(f"The machine's own are used: {_listed(found.kept)}.")
    for name, version in sorted(found.replaced.items()):
        lines.append(
            f"{name} {version} of the machine will not do beside the others; "
            f"{found.wheels[name].version} is in the folder."
        )
    for name, wheel in sorted(found.wheels.items()):
        locked = resolver.lock.get(name)
        if locked is not None and locked.public != wheel.version.public:
            lines.append(f"{name} {wheel.version}, not the locked {locked}.")
        if wheel.source and name != "coordexp":
            lines.append(f"{name} {wheel.version} was built here from its source, without compiled parts.")
    lines += [f"Left out: {name}: {why}." for name, why in choice.left_out.items()]
    return lines


def _listed(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
