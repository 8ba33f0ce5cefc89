"""`coordexp run STAGES.yaml`: training runs one after another, with gates between them."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.errors import EXIT_NOT_ACCEPTED, EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `run`."""
    parser = subparsers.add_parser(
        "run",
        help="train in stages, each accepted before the next one starts",
        description="Runs the stages of a file in order (runbooks/stages.md). What is done is not done again, and "
        "training that was ended goes on from its last checkpoint. Exit code 0: all stages accepted, 3: a stage ended "
        "but was not accepted, 2: bad input, else that of a training that failed.",
    )
    parser.add_argument("stages", type=Path, metavar="STAGES", help="YAML file")
    parser.add_argument(
        "--anew-from", metavar="NAME", help="forget this stage and those after it, and run them anew"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when every stage was accepted, 3 when one was not."""
    from functools import partial

    from coordexp.cli.training.run_checks import RUN_CHECKS, missing_paths
    from coordexp.stages.plan import load_stages
    from coordexp.stages.runner import StageRunner

    plan = load_stages(args.stages, checks=(*RUN_CHECKS, missing_paths))
    say = partial(print, flush=True)
    verdict = StageRunner(plan, say).run(anew_from=args.anew_from)
    for stage in verdict["stages"]:
        say(f"{stage['stage']}: {stage['outcome']}")
    say(f"{'accepted' if verdict['accepted'] else 'not accepted'}: {plan.verdict_file}")
    return EXIT_OK if verdict["accepted"] else EXIT_NOT_ACCEPTED
