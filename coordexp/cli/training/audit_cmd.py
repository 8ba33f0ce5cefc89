"""`coordexp audit TARGET DATA`: does every token keep its order and every target its place, in a real short run?"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from coordexp.errors import EXIT_FAILURE, EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `audit`."""
    parser = subparsers.add_parser(
        "audit",
        allow_abbrev=False,
        usage="coordexp audit TARGET DATA [--samples N] [--ranks N] [--backends NAME ...] [--key value ...]",
        help="prove the token flow of a recipe or checkpoint, from the data file to the answer",
        description="Trains a few steps on the first records through `coordexp train`, answers them with "
        "`coordexp infer`, and compares: order of records, targets of every row, prompts and pixels everywhere, "
        "answers, packing, every number of a step in float64, saved weights. Exit code 0 passed, 1 something failed.",
    )
    parser.add_argument("target", type=Path, help="a run file (YAML), or a checkpoint in its run folder")
    parser.add_argument("data", type=Path, help="JSONL file; its first records are used")
    parser.add_argument("--samples", type=int, default=8, help="records to use (default 8)")
    parser.add_argument("--ranks", type=int, default=1, help="also run on so many processes (default 1: not)")
    parser.add_argument(
        "--backends", nargs="+", default=[], choices=["vllm"], help="also answer with these backends of infer"
    )
    parser.add_argument(
        "--base-url", help="also ask this OpenAI server, which serves the model the recipe starts from"
    )
    parser.add_argument("--served-model", help="the name that server knows the model by")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds its key")
    parser.add_argument("--recipe-only", action="store_true", help="leave out the run with packing switched")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--output", type=Path, help="write the findings there as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the short runs there; must not exist")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Returns 0 when no question failed, else 1."""
    from coordexp.audit.findings import print_findings, write_findings
    from coordexp.audit.run import Audit, Options
    from coordexp.audit.subject import load_subject
    from coordexp.cli.console import console
    from coordexp.errors import ConfigError
    from coordexp.swift_bridge.checkpoint import quiet

    if args.keep is not None and args.keep.exists():
        raise ConfigError(f"--keep {args.keep} exists; expected a folder to be made.")
    quiet()
    with tempfile.TemporaryDirectory(prefix="coordexp_audit_") as scratch:
        work = args.keep or Path(scratch)
        subject = load_subject(
            args.target, args.data, samples=args.samples, overrides=args.overrides, work=work
        )
        options = Options(
            ranks=args.ranks,
            other_packing=not args.recipe_only,
            backends=tuple(args.backends),
            server=_server(args),
            max_new_tokens=args.max_new_tokens,
        )
        findings = Audit(subject, options).findings()
    print_findings(findings, console)
    if args.output is not None:
        write_findings(args.output, findings, {"target": str(args.target), "data": str(args.data)})
    return EXIT_FAILURE if any(one.passed is False for one in findings) else EXIT_OK


def _server(args: argparse.Namespace) -> dict[str, str]:
    """What `infer` is told of a server; empty without one."""
    given = {"base_url": args.base_url, "served_model": args.served_model, "api_key_env": args.api_key_env}
    found = {name: value for name, value in given.items() if value}
    if found and not (args.base_url and args.served_model):
        from coordexp.errors import ConfigError

        raise ConfigError("--base-url (http://host:port/v1) and --served-model go together.")
    return found
