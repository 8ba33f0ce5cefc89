"""Do all ranks have the same settings, code and files, and does the output folder fit them? Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from coordexp.trainers.start.meeting.facts import FoundAt, OutputFolder, StartFacts


def disagreements(ranks: Sequence[StartFacts], output: OutputFolder) -> list[str]:
    """A sentence for each thing in which a rank differs from rank 0; empty where the run can start.

    ranks: of all ranks, rank 0 first.  output: where rank 0 writes.
    """
    return [
        *_settings(ranks),
        *_versions(ranks),
        *_places(ranks),
        *_output(ranks, output),
    ]


def _settings(ranks: Sequence[StartFacts]) -> Iterator[str]:
    for name, other, more in _different(ranks, lambda rank: rank.settings):
        yield (
            f"{name}: {other.settings.get(name, 'not set')} for {other.name}, "
            f"{ranks[0].settings.get(name, 'not set')} for {ranks[0].name}{more}. Start every node with the same run "
            "file, flags and environment."
        )


def _versions(ranks: Sequence[StartFacts]) -> Iterator[str]:
    for name, other, more in _different(ranks, lambda rank: rank.versions):
        yield (
            f"{name}: {other.versions.get(name, 'not installed')} for {other.name}, "
            f"{ranks[0].versions.get(name, 'not installed')} for {ranks[0].name}{more}. Install the same version on "
            "every node."
        )


def _places(ranks: Sequence[StartFacts]) -> Iterator[str]:
    of_first = ranks[0].places
    for name in dict.fromkeys(name for rank in ranks for name in rank.places):
        found = [(rank, rank.places.get(name, FoundAt("nothing", None))) for rank in ranks]
        there = next(((rank, place) for rank, place in found if place.parts is not None), None)
        missing = [(rank, place) for rank, place in found if place.parts is None]
        if there is not None and missing:
            rank, place = missing[0]
            yield (
                f"{name}: {rank.name} finds nothing at {place.path}; {there[0].name} has {there[1].path}"
                f"{_more(len(missing) - 1)}. Copy it to every node, or name a path on a disk that all nodes share."
            )
        elif there is not None:
            others = [(rank, place) for rank, place in found if place.parts != of_first[name].parts]
            if others:
                rank, place = others[0]
                yield (
                    f"{name}: {place.path} of {rank.name} is not what {ranks[0].name} has at {of_first[name].path} "
                    f"({_first_difference(place, of_first[name])}){_more(len(others) - 1)}. Copy it to every node."
                )


def _output(ranks: Sequence[StartFacts], output: OutputFolder) -> Iterator[str]:
    apart = [rank for rank in ranks if not rank.sees_output]
    nodes = {(rank.host, rank.node) for rank in ranks}
    if apart and output.saves and not output.on_each_node:
        yield (
            f"output_dir: {apart[0].output_dir} of {apart[0].name} is not the folder {output.path} of "
            f"{ranks[0].name}{_more(len(apart) - 1)}, and only rank 0 saves checkpoints, which all ranks read. Name a "
            "folder on a disk that all nodes share, or set save_on_each_node: true."
        )
    together = [rank for rank in ranks if rank.sees_output and _node(rank) != _node(ranks[0])]
    if together and output.saves and output.on_each_node and len(nodes) > 1:
        yield (
            f"save_on_each_node: {together[0].name} writes into the same folder {output.path} as {ranks[0].name}"
            f"{_more(len(together) - 1)}, and both would write the same files. Set save_on_each_node: false, or name a "
            "folder on each node's own disk."
        )


def _node(rank: StartFacts) -> tuple[str, str]:
    return rank.host, rank.node


def _different(
    ranks: Sequence[StartFacts], of: Callable[[StartFacts], Mapping[str, str]]
) -> Iterator[tuple[str, StartFacts, str]]:
    """Each name that has not the same value everywhere, the first rank that differs from rank 0, and how many more."""
    for name in dict.fromkeys(name for rank in ranks for name in of(rank)):
        expected = of(ranks[0]).get(name)
        others = [rank for rank in ranks if of(rank).get(name) != expected]
        if others:
            yield name, others[0], _more(len(others) - 1)


def _more(number: int) -> str:
    return f" (and {number} more ranks)" if number > 1 else " (and 1 more rank)" if number else ""


def _first_difference(one: FoundAt, other: FoundAt) -> str:
    ours, theirs = one.parts or {}, other.parts or {}
    name = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return f"{name}: {ours.get(name, 'missing')} and {theirs.get(name, 'missing')}"
