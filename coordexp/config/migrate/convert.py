"""From the keys of the research code's run file to ours, one by one; `adjust` then looks at the run as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from coordexp.config.checks import swift_arguments
from coordexp.config.checks.problems import (
    KeyPath,
    Place,
    Problem,
    as_yaml,
    closest,
    dotted,
    raise_problems,
)
from coordexp.config.checks.research import Rule, rule_of
from coordexp.config.checks.validation import known_keys
from coordexp.config.checks.yaml_tree import Tree
from coordexp.config.migrate import augmentation
from coordexp.config.migrate.notes import Note, NoteKind
from coordexp.config.migrate.prompts import PROMPT_VARIANTS
from coordexp.config.run.draft import FLAT_MARKS, SWIFT_SECTIONS
from coordexp.config.run.load import LaunchSections
from coordexp.config.schema.augmentation import OPERATIONS
from coordexp.config.schema.custom import DEFAULT_VARIANT

MIGRATED = Place("migration")


@dataclass
class Migration:
    """source: the file, `extends` resolved.  out: ours so far.  notes: what was done.

    debug: what its section asks for, applied when the rest is there.
    """

    source: Tree
    out: Tree = field(default_factory=Tree)
    notes: list[Note] = field(default_factory=list)
    debug: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """The trainer variant, by our name."""
        return str(self.get("custom.trainer_variant") or DEFAULT_VARIANT)

    @property
    def is_stage2(self) -> bool:
        return self.variant != DEFAULT_VARIANT

    @property
    def lost(self) -> list[Note]:
        """What the experiment would miss here."""
        return [note for note in self.notes if note.kind is NoteKind.LOST]

    @property
    def summary(self) -> str:
        """How many notes of each kind."""
        counts = Counter(note.kind for note in self.notes)
        parts = [f"{counts[kind]} {kind.word}" for kind in NoteKind if counts[kind]]
        return ", ".join(parts) if parts else "every key is the same"

    def get(self, path: str) -> Any:
        """A value of ours, None where there is none."""
        here: Any = self.out.data
        for part in path.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        return here

    def has(self, path: str) -> bool:
        """Whether a value of ours was written, null included."""
        *above, last = path.split(".")
        here: Any = self.out.data
        for part in above:
            here = here.get(part) if isinstance(here, Mapping) else None
        return isinstance(here, Mapping) and last in here

    def put(self, path: str, value: Any) -> None:
        """Write a value of ours."""
        self.out.set(tuple(path.split(".")), value, MIGRATED)

    def drop(self, path: str) -> Any:
        """Take a value of ours back, and mappings that held nothing else; None where there was none."""
        value = self.get(path)
        self.out = self.out.without([tuple(path.split("."))])
        return value

    def note(self, kind: NoteKind, path: str, text: str) -> None:
        """Say something about a key of the source, or about a key of ours."""
        parts: KeyPath = tuple(path.split("."))
        place = self.source.place(parts) if _holds(self.source.data, parts) else None
        self.notes.append(Note(kind, path, text, place))


def take_keys(source: Tree) -> Migration:
    """Every key of the source carried, moved, dropped or noted as lost.

    Raises:
        ConfigError: ms-swift's flat form, or keys that neither side knows.
    """
    marks = [key for key in FLAT_MARKS if key in source.data]
    if marks:
        text = (
            "this is ms-swift's flat form, which is ours; `config migrate` takes files of the research code."
        )
        raise_problems([Problem(marks[0], text, place=source.place((marks[0],)))])
    migration = Migration(source)
    for path, value in _leaves(source.data):
        if path[0] == "ENV":
            migration.put(dotted(path), value)
        elif path[0] in SWIFT_SECTIONS and len(path) == 2:
            _take_swift(migration, path, value)
        else:
            _take_ours(migration, dotted(path), value)
    raise_problems(migration.problems)
    return migration


def _leaves(value: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """ms-swift's arguments whole, everything else down to what is no mapping, or an empty one."""
    for key, item in value.items():
        here = (*path, key)
        is_argument = len(here) == 2 and here[0] in SWIFT_SECTIONS
        if isinstance(item, Mapping) and item and not is_argument:
            yield from _leaves(item, here)
        elif item is not None or len(here) > 1:
            yield here, item


def _take_swift(migration: Migration, path: KeyPath, value: Any) -> None:
    name, text = str(path[1]), dotted(path)
    rule = rule_of(text)
    if rule is not None:
        _apply(migration, rule, text, value)
    elif value is None:
        return  # as if it were left out
    elif swift_arguments.is_known(name):
        migration.put(text, value)
    elif name in swift_arguments.RENAMED:
        new = f"{path[0]}.{swift_arguments.RENAMED[name]}"
        migration.put(new, value)
        migration.note(NoteKind.RENAMED, text, f"now {new}")
    else:
        _unknown(migration, path, swift_arguments.nearest(name))


def _take_ours(migration: Migration, text: str, value: Any) -> None:
    rule = rule_of(text)
    path = tuple(text.split("."))
    if rule is not None:
        _apply(migration, rule, text, value)
    elif path[-1] in known_keys(LaunchSections, path[:-1]):
        migration.put(text, value)  # a key of ours already
    else:
        _unknown(migration, path, closest(path[-1], known_keys(LaunchSections, path[:-1]), cutoff=0.7))


def _unknown(migration: Migration, path: KeyPath, near: str | None) -> None:
    text = "neither the research code nor coordexp has such a key" + (
        f"; did you mean {dotted((*path[:-1], near))}?" if near else "."
    )
    migration.problems.append(Problem(dotted(path), text, place=migration.source.place(path)))


def _apply(migration: Migration, rule: Rule, path: str, value: Any) -> None:
    asks_for_nothing = any(value is item or value == item for item in rule.unless)
    if rule.fate == "lost" and not asks_for_nothing and not _is_switched_off(migration.source, path):
        migration.note(NoteKind.LOST, path, f"{rule.why}.")
    elif rule.fate in ("lost", "dropped"):
        migration.note(NoteKind.DROPPED, path, f"{rule.why}.")
    elif path.startswith("debug."):
        migration.debug[path.removeprefix("debug.")] = value
    else:
        _carry(migration, path, rule.to, value)


def _is_switched_off(source: Tree, path: str) -> bool:
    """Whether an enclosing mapping of the key says `enabled: false`."""
    here: Any = source.data
    for part in path.split(".")[:-1]:
        here = here.get(part) if isinstance(here, Mapping) else None
        if isinstance(here, Mapping) and here.get("enabled") is False:
            return True
    return False


def _carry(migration: Migration, old: str, new: str, value: Any) -> None:
    further = rule_of(new) if new != old else None
    if further is not None and further.fate != "kept":  # `custom.extra.rollout_matching.rollout_backend`
        migration.note(NoteKind.RENAMED, old, f"now {new}")
        _apply(migration, further, new, value)
        return
    if new == "custom.prompt" and not old.endswith(("user", "user_prompt", "custom.prompt")):
        _put_prompt_variant(migration, old, value)
        return
    if new in (augmentation.OPS, augmentation.PHASES):
        value = _carried_operations(migration, new, value)
    if old.endswith("use_segm"):
        value = "segm" if value else "bbox"
    migration.put(new, value)
    if new != old:
        migration.note(NoteKind.RENAMED, old, f"now {new}")


def _carried_operations(migration: Migration, path: str, value: Any) -> Any:
    """Operations on pictures without those that are not here, each noted."""
    kept, operations, parameters = augmentation.carried(path, value)
    is_off = _is_switched_off(migration.source, path)
    for name in operations:
        why = augmentation.WHY_NOT.get(name, f"no such operation; known: {', '.join(OPERATIONS)}")
        migration.note(NoteKind.DROPPED if is_off else NoteKind.LOST, path, f"{name}: {why}.")
    if parameters:
        migration.note(
            NoteKind.DROPPED, path, f"{', '.join(parameters)}: not taken by these operations here."
        )
    if path == augmentation.OPS and any(entry["name"] == "random_crop" for entry in kept):
        migration.note(NoteKind.LOOK, path, augmentation.CROP_NOTE)
    return kept


def _put_prompt_variant(migration: Migration, old: str, variant: Any) -> None:
    text = PROMPT_VARIANTS.get(str(variant))
    if text is None:
        migration.note(
            NoteKind.LOST, old, f"no prompt of the name {as_yaml(variant)} is known; write custom.prompt."
        )
        return
    migration.put("custom.prompt", text)
    migration.note(NoteKind.RENAMED, old, "now custom.prompt")
    migration.note(
        NoteKind.LOOK,
        "custom.prompt",
        f"{variant} is a name; the text behind it is in none of the files. Ours is written out; put the text there "
        "that the checkpoint was trained with.",
    )


def _holds(data: Any, path: KeyPath) -> bool:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True
