"""A migration as text: our YAML, with a word at every default that was written out, and the report."""

from __future__ import annotations

import io
from collections.abc import Iterator

import yaml

from coordexp.config.checks.yaml_tree import parse_yaml
from coordexp.config.migrate.convert import Migration
from coordexp.config.migrate.notes import NoteKind
from coordexp.config.run.draft import TOP_KEYS

_ORDER = ("ENV", *TOP_KEYS)


def to_yaml(migration: Migration, source: str, *, with_report: bool = False) -> str:
    """Our run file. source: name of the file it was made from.  with_report: the report as comments above it."""
    data = migration.out.data
    ordered = {key: data[key] for key in sorted(data, key=lambda key: (_ORDER.index(key), key))}
    stream = io.StringIO()
    yaml.safe_dump(ordered, stream, sort_keys=False, allow_unicode=True, width=100)
    body = stream.getvalue()
    head = [f"# Made from {source} by `coordexp config migrate`."]
    if with_report:
        head += ["#", *(f"# {line}".rstrip() for line in report(migration))]
    return "\n".join([*head, "", _with_defaults_marked(migration, body)])


def report(migration: Migration) -> Iterator[str]:
    """Every note, a line each, under the title of its kind; keys dropped for one reason share a line."""
    for kind in NoteKind:
        notes = [note for note in migration.notes if note.kind is kind]
        if not notes:
            continue
        yield f"{kind.value}:"
        if kind is NoteKind.DROPPED:
            for text in dict.fromkeys(note.text for note in notes):
                yield "  " + ", ".join(note.path for note in notes if note.text == text) + f": {text}"
        else:
            yield from (f"  {note}" for note in notes)


def _with_defaults_marked(migration: Migration, body: str) -> str:
    lines = body.splitlines()
    places = parse_yaml(body, "migrated file").places
    for note in migration.notes:
        place = places.get(tuple(note.path.split("."))) if note.kind is NoteKind.DEFAULT else None
        if place is not None and place.line is not None:
            lines[place.line - 1] += "  # default of the research code"
    return "\n".join(lines) + "\n"
