"""A run file taken apart: ms-swift's arguments on one side, our sections on the other. Nothing is checked
yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordexp.config.checks import swift_arguments
from coordexp.config.checks.problems import KeyPath, Place, Problem, closest, dotted, raise_problems
from coordexp.config.checks.research import advice
from coordexp.config.checks.yaml_tree import Tree, read_yaml
from coordexp.config.schema.sections import launcher_only_problems
from coordexp.config.schema.training import TRAINER_KEYS, Training

SWIFT_SECTIONS = ("model", "template", "data", "tuner", "training")
OUR_SECTIONS = ("custom", "stage2_ab", "rollout_matching", "telemetry", "debug", "experiment")
TOP_KEYS = (*SWIFT_SECTIONS, "deepspeed", *OUR_SECTIONS, "global_max_length")
OUR_FLAGS = ("custom_trainer_variant", "coordexp", "coordexp_config")
FLAT_MARKS = (*OUR_FLAGS, "external_plugins", "ignore_args_error")


@dataclass(frozen=True)
class Written:
    """A value as it was written: under which dotted path, and where."""

    value: Any
    path: str
    place: Place | None


@dataclass
class Draft:
    """swift: argument name -> value.  ours: our sections.  variant: from `custom_trainer_variant`.

    derived: argument name -> the key of ours that became it.
    """

    swift: dict[str, Written] = field(default_factory=dict)
    derived: dict[str, Written] = field(default_factory=dict)
    ours: Tree = field(default_factory=Tree)
    variant: Written | None = None
    env: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def written(self, name: str) -> tuple[str, Place | None]:
        """Dotted path and place of an ms-swift argument, or of the key of ours that became it."""
        value = self.swift.get(name) or self.derived.get(name)
        return (name, None) if value is None else (value.path, value.place)

    def put_swift(self, name: str, value: Any, path: KeyPath, place: Place | None) -> None:
        """Take a value for ms-swift; a name nobody knows, or one that is set twice, becomes a problem."""
        if not swift_arguments.is_known(name):
            text = advice(dotted(path)) if name not in swift_arguments.RENAMED else None
            self.problems.append(Problem(dotted(path), text or unknown_argument(name), place=place))
        elif name in self.swift and self.swift[name].place != place:
            first = self.swift[name]
            text = f"already set as {first.path} ({first.place}); keep one of them."
            self.problems.append(Problem(dotted(path), text, place=place))
        else:
            self.swift[name] = Written(value, dotted(path), place)


def draft_of(tree: Tree) -> Draft:
    """Take apart a run file of either form.

    Raises:
        ConfigError: a file that mixes the two forms.
    """
    flat_marks = [key for key in FLAT_MARKS if key in tree.data]
    section_marks = [
        key for key in tree.data if key in (*OUR_SECTIONS, "global_max_length") and key != "debug"
    ]
    section_marks += [key for key in (*SWIFT_SECTIONS, "debug") if isinstance(tree.data.get(key), Mapping)]
    if flat_marks and section_marks:
        where = section_marks[0]
        text = (
            f"{flat_marks[0]} makes this ms-swift's flat form, where our sections stand under `coordexp:` "
            f"and "
            "ms-swift's arguments at the top level; or leave out " + ", ".join(flat_marks) + "."
        )
        raise_problems([Problem(where, text, place=tree.place((where,)))])
    draft = Draft()
    _take_environment(tree, draft)
    if section_marks:
        _take_sections(tree, draft)
    else:
        _take_flat(tree, draft)
    return draft


def _take_environment(tree: Tree, draft: Draft) -> None:
    variables = tree.data.get("ENV") or {}
    if not isinstance(variables, Mapping):
        text = "expected a mapping of variables, such as ENV: {OMP_NUM_THREADS: '1'}."
        draft.problems.append(Problem("ENV", text, value=variables, place=tree.place(("ENV",))))
        return
    for name, value in variables.items():
        if value is None or isinstance(value, Mapping | list):
            place = tree.place(("ENV", name))
            draft.problems.append(Problem(f"ENV.{name}", "expected text.", value=value, place=place))
        else:
            draft.env[str(name)] = str(value)


def _take_sections(tree: Tree, draft: Draft) -> None:
    ours: dict[str, Any] = {}
    for key, value in tree.data.items():
        place = tree.place((key,))
        if key in SWIFT_SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                text = f"expected a mapping, such as {key}: {{{key}: ...}}."
                draft.problems.append(Problem(key, text, value=value, place=place))
                continue
            for name, item in (value or {}).items():
                if key == "training" and name in Training.model_fields:
                    ours.setdefault("training", {})[name] = item
                else:
                    draft.put_swift(name, item, (key, name), tree.place((key, name)))
        elif key == "deepspeed" and not isinstance(value, Mapping):
            draft.put_swift(key, value, (key,), place)
        elif key in TOP_KEYS:
            if value is not None:
                ours[key] = value
        elif key != "ENV":
            draft.problems += _unknown_top(tree, key)
    draft.ours = Tree(ours, {path: place for path, place in tree.places.items() if path and path[0] in ours})


def _take_flat(tree: Tree, draft: Draft) -> None:
    dotted_keys = [key for key in tree.data if key.partition(".")[0] in OUR_SECTIONS and "." in key]
    for key, value in tree.data.items():
        place = tree.place((key,))
        if key in dotted_keys:
            continue
        if key == "custom_trainer_variant":
            draft.variant = Written(value, key, place)
        elif key == "coordexp":
            if isinstance(value, Mapping):
                draft.ours = tree.subtree(key)
            elif value is not None:
                text = "expected a mapping of our sections."
                draft.problems.append(Problem(key, text, value=value, place=place))
        elif key == "coordexp_config":
            if "coordexp" in tree.data:
                text = "coordexp is given too; put the settings in one place."
                draft.problems.append(Problem(key, text, value=value, place=place))
            else:
                draft.ours = read_yaml(str(value))
        elif key not in ("ENV", "ignore_args_error"):
            draft.put_swift(key, value, (key,), place)
    for key in dotted_keys:  # `stage2_ab.schedule.b_ratio: 0.5`, as `swift sft FILE` takes it too
        place = tree.place((key,))
        draft.ours.set(tuple(key.split(".")), tree.data[key], place or Place("run file"))
    draft.problems += launcher_only_problems(draft.ours)
    for key in ("deepspeed", "global_max_length"):
        draft.ours.data.pop(key, None)  # already a problem
    training = draft.ours.data.get("training")
    if isinstance(training, dict):
        draft.ours.data["training"] = {
            key: training[key] for key in training if key in TRAINER_KEYS
        }  # as well


def unknown_argument(name: str) -> str:
    """What to say of a name that is no ms-swift argument."""
    near = swift_arguments.nearest(name)
    if name in OUR_SECTIONS:
        return (
            f"in ms-swift's flat form this section stands under `coordexp:`; write coordexp: {{{name}: ...}}."
        )
    if name in Training.model_fields:
        return "only the `training` section of our own form takes it."
    return "ms-swift has no such argument" + (f"; did you mean {near}?" if near else ".")


def _unknown_top(tree: Tree, key: str) -> list[Problem]:
    """A section that nobody knows; key by key where it is one of the research code."""
    value = tree.data[key]
    inner = [(key, name) for name in value] if isinstance(value, Mapping) else []
    known = [(path, text) for path in inner if (text := advice(dotted(path))) is not None]
    if known:
        return [Problem(dotted(path), text, place=tree.place(path)) for path, text in known]
    return [Problem(key, _unknown_top_key(key), place=tree.place((key,)))]


def _unknown_top_key(key: str) -> str:
    if swift_arguments.is_known(key):
        section = swift_arguments.all_arguments(rlhf=True)[key].section
        return f"an ms-swift argument; in a file with sections it stands inside one: {section}.{key}."
    near = closest(key, TOP_KEYS)
    return "unknown section" + (
        f"; did you mean {near}?" if near else f"; expected one of {', '.join(TOP_KEYS)}."
    )
