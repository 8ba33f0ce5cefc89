"""From a YAML file and command-line overrides to a checked `RunConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from coordexp.config.checks import swift_arguments
from coordexp.config.checks.not_built import SWIFT_NOT_BUILT, find_not_built, refuse
from coordexp.config.checks.problems import KeyPath, Place, Problem, dotted, raise_problems
from coordexp.config.checks.removed import find_removed
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree, read_yaml
from coordexp.config.run.data_files import DATA_ARGUMENTS, expanded, files_of_mixture, from_home
from coordexp.config.run.draft import Draft, Written, draft_of
from coordexp.config.run.overrides import apply_overrides
from coordexp.config.run.run_config import RunConfig, is_our_plugin
from coordexp.config.run.run_problems import RunCheck, run_problems
from coordexp.config.schema.custom import DEFAULT_VARIANT, RLHF
from coordexp.config.schema.fusion import Fusion
from coordexp.config.schema.sections import Sections, check_sections_fit, check_variant
from coordexp.config.schema.training import DeepSpeed, accumulation_steps
from coordexp.errors import ConfigError

# our key -> the ms-swift argument it becomes
BECOMES: dict[KeyPath, str] = {
    ("custom", "train_jsonl"): "dataset",
    ("custom", "val_jsonl"): "val_dataset",
    ("global_max_length",): "max_length",
    ("deepspeed",): "deepspeed",
    ("training", "effective_batch_size"): "gradient_accumulation_steps",
}


TRUNCATION, RAISE = "truncation_strategy", "raise"
RLHF_TYPE = "rlhf_type"


class LaunchSections(Sections):
    """Our sections, and the keys of ours that `coordexp train` turns into ms-swift arguments."""

    deepspeed: DeepSpeed | None = Field(
        default=None, description="DeepSpeed; also just its name: `deepspeed: zero2`."
    )
    global_max_length: int | None = Field(
        default=None,
        gt=0,
        description="Longest sample in tokens, prompt and target together: ms-swift's max_length.",
    )


def load_run_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    refuse_not_built: bool = True,
    checks: Sequence[RunCheck] = (),
) -> RunConfig:
    """Read, override, check and resolve a run file.

    Args:
        path: YAML, in either form.
        overrides: command-line words: `--set dotted.path=value`, `--max_steps 100`, ...
        world_size: number of ranks; None reads WORLD_SIZE, or NPROC_PER_NODE and NNODES.
        refuse_not_built: whether a valid key whose feature is missing is an error.
        checks: further checks of the resolved run, from parts of the package that this one may not import.

    Raises:
        ConfigError: every problem, each with dotted path, value, file and line, and what was expected.
    """
    return resolve_run(
        read_yaml(path),
        str(path),
        overrides,
        world_size=world_size,
        refuse_not_built=refuse_not_built,
        checks=checks,
    )


def resolve_run(
    tree: Tree,
    path: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    refuse_not_built: bool = True,
    checks: Sequence[RunCheck] = (),
) -> RunConfig:
    """As `load_run_config`, from a tree that was read. path: what errors call it."""
    if not tree.data:
        raise ConfigError(f"{path}: is empty; expected the settings of a run (runbooks/config.md).")
    draft = draft_of(tree)
    apply_overrides(draft, overrides)
    swift, problems = _checked_swift(draft)
    launch, failed, schema_problems = _checked_ours(draft.ours)
    variant, variant_problems = _variant(draft, launch)
    problems = [*draft.problems, *problems, *schema_problems, *variant_problems]
    if refuse_not_built:
        problems += _not_built(draft, swift)
    sections = Sections(
        **{name: getattr(launch, name) for name in launch.model_fields_set & Sections.model_fields.keys()}
    )
    world_size = world_size or _world_size(draft.env)
    if variant is None:
        raise_problems(problems)
        raise AssertionError("a run without a variant has a problem")
    further = [
        *check_sections_fit(sections, variant, draft.ours),
        *_derive_swift(draft, launch, swift, world_size),
        *run_problems(variant, sections, swift, draft.written, draft.ours.place),
    ]
    problems += [problem for problem in further if problem.section not in failed]
    if not failed:
        problems += [
            problem for check in checks for problem in check(variant, sections, swift, draft.written)
        ]
    raise_problems(problems)
    return RunConfig(
        path=path,
        variant=variant,
        swift=swift,
        sections=sections,
        effective_batch_size=_effective_batch_size(swift, world_size),
        global_max_length=launch.global_max_length,
        world_size=world_size,
        env=draft.env,
        sources=_sources(draft),
    )


def _checked_ours(tree: Tree) -> tuple[LaunchSections, set[str], list[Problem]]:
    """Our sections, the names of those left out because they are wrong, and what is wrong."""
    launch, problems = validate(LaunchSections, tree)
    if launch is not None:
        return launch, set(), problems
    removed = [problem for _, problem in find_removed(tree)]
    failed = {problem.section for problem in problems if problem not in removed}
    rest, _ = validate(LaunchSections, tree.without((name,) for name in failed))
    return rest if rest is not None else LaunchSections(), failed, problems


def _checked_swift(draft: Draft) -> tuple[dict[str, Any], list[Problem]]:
    values, problems = {}, []
    arguments = swift_arguments.all_arguments(rlhf=RLHF_TYPE in draft.swift)
    for name, written in draft.swift.items():
        if name == TRUNCATION and written.value == RAISE:
            continue
        if name not in arguments:
            text = f"an argument of swift rlhf, which a file runs that sets {RLHF_TYPE}."
            problems.append(Problem(written.path, text, place=written.place))
            continue
        try:
            value = arguments[name].convert(written.value)
        except ValueError as error:
            problems.append(Problem(written.path, f"{error}.", value=written.value, place=written.place))
            continue
        values[name] = from_home(value) if name in DATA_ARGUMENTS else value
    if TRUNCATION in draft.swift and draft.swift[TRUNCATION].value == RAISE:
        problems += _stop_at_long_samples(draft, values)
    return values, problems


def _stop_at_long_samples(draft: Draft, swift: dict[str, Any]) -> list[Problem]:
    """`truncation_strategy: raise`, which ms-swift spells delete with strict: true, put into `swift`."""
    if swift.get("strict") is False:
        written = draft.swift["strict"]
        text = f"{TRUNCATION}: raise stops the run at a sample that is too long; remove one of them."
        return [Problem(written.path, text, value=False, place=written.place)]
    swift |= {TRUNCATION: "delete", "strict": True}
    return []


def _variant(draft: Draft, launch: LaunchSections) -> tuple[str | None, list[Problem]]:
    """The trainer variant, from either of its two places; None where it cannot be told."""
    in_section, written = launch.custom.trainer_variant, draft.variant
    if RLHF_TYPE in draft.swift:
        return RLHF, _no_variant(draft, in_section)
    if written is None:
        plugins = draft.swift.get("external_plugins")
        if in_section is None and plugins is not None and is_our_plugin(plugins.value):
            text = (
                f"is missing; plain `swift sft` would train without CoordExp. Write {DEFAULT_VARIANT}, say."
            )
            return None, [Problem("custom_trainer_variant", text, place=plugins.place)]
        return in_section or _variant_as_written(draft.ours), []
    try:
        variant = check_variant(written.value)
    except ValueError as error:
        return None, [Problem(written.path, f"{error}.", value=written.value, place=written.place)]
    if in_section not in (None, variant):
        text = f"custom.trainer_variant says {in_section}; keep one of them."
        return None, [Problem(written.path, text, value=written.value, place=written.place)]
    return variant, []


def _no_variant(draft: Draft, in_section: str | None) -> list[Problem]:
    """A variant in a run of swift rlhf, which has none."""
    text = f"has no effect with {RLHF_TYPE}, which says what trains; remove one of them."
    if draft.variant is not None:
        written = draft.variant
        return [Problem(written.path, text, value=written.value, place=written.place)]
    path: KeyPath = ("custom", "trainer_variant")
    found = [Problem(dotted(path), text, value=in_section, place=draft.ours.place(path))]
    return [] if in_section is None else found


def _variant_as_written(tree: Tree) -> str | None:
    """custom.trainer_variant where the section may have other faults; None where it is wrong itself."""
    custom = tree.data.get("custom")
    written = custom.get("trainer_variant") if isinstance(custom, Mapping) else None
    try:
        return DEFAULT_VARIANT if written is None else check_variant(written)
    except ValueError:
        return None


def _not_built(draft: Draft, swift: Mapping[str, Any]) -> list[Problem]:
    problems = find_not_built(draft.ours)
    for feature in SWIFT_NOT_BUILT:
        name = str(feature.path[0])
        if feature.asked_for(swift.get(name)):
            written = draft.swift[name]
            problems.append(refuse(written.path, feature, swift[name], written.place))
    return problems


def _derive_swift(
    draft: Draft, launch: LaunchSections, swift: dict[str, Any], world_size: int
) -> list[Problem]:
    """Turn our launch keys into ms-swift arguments, in `swift`; a problem where both are set and differ."""
    custom, training = launch.custom, launch.training
    wanted: dict[KeyPath, Any] = {
        ("custom", "train_jsonl"): None if custom.train_jsonl is None else expanded(custom.train_jsonl),
        ("custom", "val_jsonl"): None if custom.val_jsonl is None else expanded(custom.val_jsonl),
        ("global_max_length",): launch.global_max_length,
        ("deepspeed",): launch.deepspeed.config if launch.deepspeed and launch.deepspeed.enabled else None,
    }
    problems = []
    size = training.effective_batch_size
    if size is not None:
        path: KeyPath = ("training", "effective_batch_size")
        try:
            wanted[path] = accumulation_steps(size, _per_device_batch_size(swift), world_size)
        except ValueError as error:
            problems.append(Problem(dotted(path), f"{error}.", value=size, place=draft.ours.place(path)))
    for key_path, value in wanted.items():
        name = BECOMES[key_path]
        if value is None:
            continue
        if name in swift and swift[name] != value:
            other = draft.swift[name]
            text = (
                f"makes {name} {value}, but {other.path} is {swift[name]} ({other.place}); keep one of them."
            )
            problems.append(Problem(dotted(key_path), text, place=draft.ours.place(key_path)))
        swift[name] = value
        draft.derived[name] = Written(value, dotted(key_path), draft.ours.place(key_path))
    if custom.fusion is not None:
        _derive_mixed_files(draft, custom.fusion, swift)
    return problems


def _derive_mixed_files(draft: Draft, fusion: Fusion, swift: dict[str, Any]) -> None:
    """Files of `custom.fusion` for ms-swift, where nothing else names any (what does is refused: effects.py)."""
    path: KeyPath = ("custom", "fusion")
    for name, validation in (("dataset", False), ("val_dataset", True)):
        files = files_of_mixture(fusion, validation=validation)
        if files and name not in swift:
            swift[name] = files
            draft.derived[name] = Written(files, dotted(path), draft.ours.place(path))


def _per_device_batch_size(swift: Mapping[str, Any]) -> int:
    """At least 1: a smaller value is a problem of its own."""
    default = swift_arguments.all_arguments()["per_device_train_batch_size"].default
    return max(1, int(swift.get("per_device_train_batch_size", default)))


def _effective_batch_size(swift: Mapping[str, Any], world_size: int) -> int | None:
    """Samples of an optimizer step; None where ms-swift chooses the accumulation itself."""
    steps = swift.get("gradient_accumulation_steps")
    return None if steps is None else _per_device_batch_size(swift) * world_size * int(steps)


def _world_size(env: Mapping[str, str]) -> int:
    """Ranks of the run as the environment (or the file's ENV) states them; 1 without a word."""
    known = {**env, **os.environ}
    starts_ranks = "NPROC_PER_NODE" in known and "LOCAL_RANK" not in known  # WORLD_SIZE may count nodes then
    names = ["WORLD_SIZE"] if "WORLD_SIZE" in known and not starts_ranks else ["NPROC_PER_NODE", "NNODES"]
    ranks = 1
    for name in names:
        text = known.get(name, "1")
        if not text.isdecimal() or int(text) == 0:
            raise ConfigError(f"environment variable {name} = {text!r}: expected a number of at least 1.")
        ranks *= int(text)
    return ranks


def _sources(draft: Draft) -> dict[str, str]:
    """Dotted path (argument name for ms-swift's) -> where it was written."""
    sources = {name: _shown(written.place) for name, written in draft.swift.items()}
    if draft.variant is not None:
        sources["custom.trainer_variant"] = _shown(draft.variant.place)
    for path, _ in _leaves(draft.ours.data, ()):
        sources[dotted(path)] = _shown(draft.ours.place(path))
        if path in BECOMES or path[:1] in BECOMES:
            name = BECOMES.get(path) or BECOMES[path[:1]]
            sources.setdefault(name, f"{sources[dotted(path)]} ({dotted(path)})")
    return sources


def _shown(place: Place | None) -> str:
    return "default" if place is None else str(place)


def _leaves(value: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    return [(path, value)]
