"""Train two run configurations on the same seed and data and compare their losses, step by step.

    python tools/loss_compare.py before.yaml after.yaml --max-steps 5
    python tools/loss_compare.py configs/demo/stage1.yaml configs/demo/stage1.yaml --max-steps 5 \
        --set-a custom.head=plain --set-b custom.head=fused
    python tools/loss_compare.py run.yaml run.yaml --max-steps 5 --code-a ../before --code-b .

`--code-a`, `--code-b`: checkouts whose code trains A and B (`git worktree add ../before HEAD~1`).
How a change that must change nothing is shown to change nothing: a refactor, the fused head, another cut of the step
into micro-batches and ranks. Both runs go through `coordexp train`, one after the other, without evaluation and
checkpoints, in a temporary folder (`--keep DIR` leaves runs and logs in DIR/a and DIR/b).
Exit status: 0 the curves agree, 1 they differ by more than --tolerance or a run failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordexp.config import load_run_config
from coordexp.errors import EXIT_FAILURE, EXIT_OK, ConfigError, CoordExpError
from coordexp.metrics.sinks import METRICS_FILE

QUIET = (
    "--add_version", "false", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no",
    "--load_best_model_at_end", "false", "--report_to", "none",
)  # fmt: skip
LOG_TAIL = 3000


@dataclass(frozen=True)
class Row:
    """One optimizer step of both runs."""

    step: int
    loss_a: float
    loss_b: float

    @property
    def absolute(self) -> float:
        return abs(self.loss_a - self.loss_b)

    @property
    def relative(self) -> float:
        """To the larger of the two; 0 where both are 0."""
        scale = max(abs(self.loss_a), abs(self.loss_b))
        return self.absolute / scale if scale else 0.0


def compare(curve_a: Mapping[int, float], curve_b: Mapping[int, float]) -> list[Row]:
    """Rows of two curves (step -> loss). Raises CoordExpError when they do not have the same steps."""
    if not curve_a or curve_a.keys() != curve_b.keys():
        raise CoordExpError(
            f"A logged a loss at steps {_ranges(curve_a)}, B at steps {_ranges(curve_b)}; expected the same steps. "
            "Give both --max-steps, and the same number of samples per step"
        )
    return [Row(step, curve_a[step], curve_b[step]) for step in sorted(curve_a)]


def read_curve(run_dir: Path) -> dict[int, float]:
    """Training loss by optimizer step from the metrics.jsonl of a run."""
    records = map(json.loads, (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    return {
        record["global_step"]: record["metrics"]["loss"]
        for record in records
        if record.get("mode") == "train" and "loss" in record["metrics"]
    }


def train(config: str, overrides: Sequence[str], run_dir: Path, code: Path | None = None) -> dict[int, float]:
    """Run `coordexp train` into `run_dir`; its loss curve. Raises CoordExpError with the end of the log if it fails."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "train.log"
    command = [sys.executable, "-m", "coordexp.cli.main", "train", config, *overrides]
    command += ["--output_dir", str(run_dir)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment_of(code)
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8")[-LOG_TAIL:]
        raise CoordExpError(
            f"training {config} failed with exit status {done.returncode}; its log ends\n{tail}"
        )
    return read_curve(run_dir)


def environment_of(code: Path | None) -> dict[str, str]:
    """The environment in which Python imports `coordexp` from the checkout `code`; None: as it is."""
    if code is None:
        return dict(os.environ)
    if not (code / "coordexp" / "__init__.py").is_file():
        raise ConfigError(f"{code}: expected a checkout with a folder coordexp")
    paths = [str(code.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def check_same_data(
    config_a: str, config_b: str, overrides_a: Sequence[str], overrides_b: Sequence[str]
) -> None:
    """Raises ConfigError for a file that `coordexp train` would refuse, and for two that name other data."""
    a, b = load_run_config(config_a, overrides_a), load_run_config(config_b, overrides_b)
    if a.swift.get("dataset") != b.swift.get("dataset"):
        raise ConfigError(
            f"A trains on {a.swift.get('dataset')}, B on {b.swift.get('dataset')}: losses can be compared on the same "
            "data only; add --set custom.train_jsonl=FILE"
        )


def report(rows: Sequence[Row], tolerance: float) -> bool:
    """Print both curves and their largest differences; True if none is above the tolerance."""
    print(f"{'step':>6} {'A':>14} {'B':>14} {'|A - B|':>10} {'relative':>10}")
    for row in rows:
        mark = "" if row.relative <= tolerance else "  <-"
        print(
            f"{row.step:>6} {row.loss_a:>14.8f} {row.loss_b:>14.8f} {row.absolute:>10.2e} {row.relative:>10.2e}{mark}"
        )
    worst = max(row.relative for row in rows)
    agree = worst <= tolerance
    print(
        f"largest difference: {max(row.absolute for row in rows):.3e} absolute, {worst:.3e} relative; "
        f"tolerance {tolerance:g} relative: {'ok' if agree else 'ABOVE'}"
    )
    return agree


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("a", metavar="A", help="run configuration (YAML)")
    parser.add_argument("b", metavar="B", help="the one to compare it with; may be the same file")
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="optimizer steps; default: what the files say"
    )
    parser.add_argument(
        "--seed", type=int, default=42, help="seed of weights, dropout and data order of both"
    )
    for flag, of in (("--set", "both"), ("--set-a", "A"), ("--set-b", "B")):
        parser.add_argument(
            flag, nargs="+", action="extend", default=[], metavar="PATH=VALUE", help=f"override of {of}"
        )
    for flag, of in (("--code-a", "A"), ("--code-b", "B")):
        parser.add_argument(flag, type=Path, metavar="DIR", help=f"checkout whose code trains {of}")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest relative difference; default 1e-5"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs there; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    common = [*QUIET, "--seed", str(args.seed), "--data_seed", str(args.seed)]
    if args.max_steps is not None:
        common += ["--max_steps", str(args.max_steps)]
    flags_a, flags_b = (
        [*common, *(word for item in [*args.set, *own] for word in ("--set", item))]
        for own in (args.set_a, args.set_b)
    )
    try:
        if args.keep is not None and args.keep.exists():
            raise ConfigError(f"--keep {args.keep} exists; expected a folder to be made")
        check_same_data(args.a, args.b, flags_a, flags_b)
        with tempfile.TemporaryDirectory(prefix="loss_compare_") as scratch:
            folder = args.keep or Path(scratch)
            rows = compare(
                train(args.a, flags_a, folder / "a", args.code_a),
                train(args.b, flags_b, folder / "b", args.code_b),
            )
    except CoordExpError as error:
        print(f"loss_compare: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK if report(rows, args.tolerance) else EXIT_FAILURE


def _ranges(steps: Mapping[int, float]) -> str:
    return f"{min(steps)}..{max(steps)} ({len(steps)})" if steps else "none"


if __name__ == "__main__":
    sys.exit(main())
