"""`coordexp config ...`: check run files, show what they resolve to, print the reference."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordexp.errors import EXIT_BAD_INPUT, EXIT_OK, ConfigError
from coordexp.files import write_text

if TYPE_CHECKING:
    from coordexp.config import RunConfig, Sections
    from coordexp.config.checks.problems import Problem, WrittenOf

REFERENCE = Path("runbooks/config.md")  # of the checkout that it is called in
STUDY_KEY = "recipes"
NOT_RUN_FILES = ("accelerate", "deepspeed", "eval")  # folders of YAML that is no run configuration


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `config` and its subcommands."""
    parser = subparsers.add_parser("config", help="check and show run configurations")
    commands = parser.add_subparsers(dest="config_command", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="validate run files, stages files and studies",
        description="Validate YAML run files, stages files and studies, or all of a folder, without loading torch. "
        "Exit code 2 when one is wrong.",
    )
    check.add_argument("files", nargs="+", type=Path, metavar="PATH", help="file or folder")
    check.add_argument(
        "--paths",
        action="store_true",
        help="data, models and plugins that do not exist are errors (without it: warnings)",
    )
    show = commands.add_parser(
        "show",
        help="print every value of a run and where it was written",
        description="Resolve a run file, with overrides, and print each value with its source.",
    )
    show.add_argument("config", type=Path, help="YAML file")
    show.add_argument("--json", action="store_true", help="print resolved_config.json instead of a table")
    show.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--key value", help="overrides of the file"
    )
    migrate = commands.add_parser(
        "migrate",
        help="turn a run file of the research code into ours",
        description="Print our form of a run file of the research code, `extends` resolved, with every default of its "
        "schema that differs from ours written out. Exit code 2 where keys are unknown or cannot be carried over "
        "(runbooks/migrate.md).",
    )
    migrate.add_argument("config", type=Path, help="YAML file of the research code")
    migrate.add_argument(
        "--report", action="store_true", help="say what became of every key that is not the same, as comments"
    )
    migrate.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    migrate.add_argument(
        "--lossy",
        action="store_true",
        help="leave out what cannot be carried over, and say so, instead of stopping",
    )
    reference = commands.add_parser("write-reference", help=f"print {REFERENCE} from the models")
    reference.add_argument("--output", type=Path, default=REFERENCE, help=f"default {REFERENCE}")


def run(args: argparse.Namespace) -> int:
    """Run the chosen `config` subcommand; returns the process exit code."""
    if args.config_command == "check":
        return _check(args.files, paths_must_exist=args.paths)
    if args.config_command == "show":
        return _show(args.config, args.overrides, as_json=args.json)
    if args.config_command == "migrate":
        return _migrate(args.config, args.output, with_report=args.report, lossy=args.lossy)
    from coordexp.config.reference import render_reference

    write_text(args.output, render_reference())
    print(f"wrote {args.output}")
    return EXIT_OK


def _check(paths: Sequence[Path], *, paths_must_exist: bool) -> int:
    from coordexp.config.checks.research import FOREIGN

    files, wrong = list(_run_files(paths)), 0
    for file in files:
        try:
            warnings = _check_file(file, paths_must_exist=paths_must_exist)
        except ConfigError as error:
            wrong += 1
            print(f"{file}: {error}", file=sys.stderr)
            if FOREIGN in str(error):
                print(f"{file}: `coordexp config migrate {file}` rewrites the whole file.", file=sys.stderr)
            continue
        for warning in warnings:
            print(f"{file}: warning: {warning}", file=sys.stderr)
        print(f"{file}: ok")
    print(f"{len(files)} files, {wrong} wrong")
    return EXIT_BAD_INPUT if wrong else EXIT_OK


def _check_file(file: Path, *, paths_must_exist: bool) -> list[str]:
    """Warnings of a valid file: settings that train less than they seem to, and paths that need not exist."""
    from coordexp.cli.training.run_checks import RUN_CHECKS, missing_paths
    from coordexp.config import load_run_config
    from coordexp.config.checks.yaml_tree import read_yaml
    from coordexp.config.run.advice import advice
    from coordexp.stages.plan import STAGES_KEY, load_stages
    from coordexp.study.plan import read_study

    keys = read_yaml(file).data
    if STUDY_KEY in keys:
        read_study(file)
        return []
    missing: list[Problem] = []

    def note(variant: str, sections: Sections, swift: Mapping[str, Any], written: WrittenOf) -> list[Problem]:
        missing.extend(missing_paths(variant, sections, swift, written))
        return []

    checks = (*RUN_CHECKS, missing_paths if paths_must_exist else note)
    if STAGES_KEY in keys:
        configs = [stage.config for stage in load_stages(file, checks=checks).stages]
    else:
        configs = [load_run_config(file, checks=checks)]
    advised = [
        sentence
        for config in configs
        for sentence in advice(config.swift, coord_offset=config.custom.coord_offset.enabled)
    ]
    return list(dict.fromkeys([*map(str, missing), *advised]))


def _run_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files given, and those in the folders given."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted([*path.rglob("*.yaml"), *path.rglob("*.yml")])
        found = [file for file in found if not set(NOT_RUN_FILES) & set(file.relative_to(path).parts)]
        if not found:
            raise ConfigError(f"{path}: no YAML files in this folder.")
        yield from found


def _show(file: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    from coordexp.cli.training.run_checks import RUN_CHECKS
    from coordexp.config import derive, load_run_config, resolved_config

    config = load_run_config(file, overrides, checks=RUN_CHECKS)
    swift = config.swift
    derived = {"world_size": config.world_size}
    if config.effective_batch_size is not None:
        steps = int(swift["gradient_accumulation_steps"])
        derived = derive(
            world_size=config.world_size,
            per_device_batch_size=config.effective_batch_size // config.world_size // steps,
            gradient_accumulation_steps=steps,
            max_steps=swift.get("max_steps"),
        )
    resolved = resolved_config(
        config.variant, config.sections, swift, derived=derived, sources=config.sources
    )
    if as_json:
        print(json.dumps(resolved, indent=2, ensure_ascii=False))
    else:
        _print_table(config, resolved)
    return EXIT_OK


def _migrate(file: Path, output: Path | None, *, with_report: bool, lossy: bool) -> int:
    from coordexp.config.checks.yaml_tree import parse_yaml, read_yaml
    from coordexp.config.migrate import migrate, to_yaml
    from coordexp.config.run.load import resolve_run
    from coordexp.metrics.best import best_metric_problems

    migration = migrate(read_yaml(file))
    if migration.lost and not lossy:
        lines = "".join(f"\n  {note}" for note in migration.lost)
        raise ConfigError(f"{file}: cannot be carried over (--lossy leaves it out):{lines}")
    text = to_yaml(migration, file.name, with_report=with_report)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
    say = partial(print, file=sys.stderr)
    say(f"{file}: {migration.summary}" + ("" if with_report else "; --report says which"))
    try:
        resolve_run(
            parse_yaml(text, str(output or "result")), str(output or "result"), checks=(best_metric_problems,)
        )
    except ConfigError as error:
        say(f"the result needs a hand: {error}")
        return EXIT_BAD_INPUT
    return EXIT_OK


def _print_table(config: RunConfig, resolved: dict[str, Any]) -> None:
    rows = [(f"swift.{name}", value, name) for name, value in resolved["swift"].items()]
    rows += [
        (path, value, path)
        for name in type(config.sections).model_fields
        for path, value in _leaves(resolved[name], name)
        if path != "custom.trainer_variant"
    ]
    rows.insert(0, ("trainer_variant", config.variant, "custom.trainer_variant"))
    rows += [(f"derived.{name}", value, "") for name, value in resolved["derived"].items()]
    lines = [
        (
            path,
            json.dumps(value, ensure_ascii=False),
            config.sources.get(source, "default") if source else "derived",
        )
        for path, value, source in rows
    ]
    width = max(len(path) for path, _, _ in lines)
    for path, value, source in lines:
        print(f"{path:<{width}}  {value:<28}  {source}")
    print(f"{'config_hash':<{width}}  {resolved['config_hash']}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif value is not None or "." in path:
        yield path, value
