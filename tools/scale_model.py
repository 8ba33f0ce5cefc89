"""Step time and memory of a training by formula, from a few rates; and real runs that hold the formulas to account.

    python tools/scale_model.py predict --model 4B --gpus 8                                  # stage 1
    python tools/scale_model.py predict --model 4B --gpus 8 --stage rollouts --rollout_length 1024
    python tools/scale_model.py predict --model 8B --gpus 16 --stage rollouts --engine servers --servers 4 --gpu H200
    python tools/scale_model.py calibrate --output runs/scale/rates.json    # rates of this CPU, from five short runs
    python tools/scale_model.py check --rates runs/scale/rates.json        # predicted beside measured; 1 above 20 %
    python tools/scale_model.py table --write                               # into runbooks/sizing.md

Rates of a GPU are stated shares of its data sheet unless --rates names a file; each is printed with its source. Runs of
calibrate and check train tiny models on this CPU. Their time is CPU seconds of the process, which other work on the
cores changes little; their memory is the weights, the optimizer's states and what torch's allocator gave out beyond.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale.page import SHEET, shown_rate, tables, where_it_goes, write_page
from scale.plan import Engine, Plan, Prediction, predict
from scale.rates import SHEETS, Rates, gpu_rates, read_rates, write_rates

from coordexp.errors import CoordExpError
from coordexp.files import write_text

FOLDER = Path("runs/scale")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except CoordExpError as error:
        print(f"scale_model {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    told = commands.add_parser("predict", help="memory and seconds of a step")
    told.set_defaults(run=_predict)
    choices: dict[str, Sequence[str]] = {
        "stage": ("stage1", "rollouts"), "engine": get_args(Engine), "head": ("fused", "plain"),
    }  # fmt: skip
    for one in fields(Plan):
        default: Any = one.default
        if isinstance(default, bool):
            told.add_argument(f"--{one.name}", action=argparse.BooleanOptionalAction, default=default)
        else:
            told.add_argument(
                f"--{one.name}", type=type(default), default=default, choices=choices.get(one.name)
            )
    told.add_argument("--gpu", choices=SHEETS, default=SHEET.name)
    told.add_argument("--rates", type=Path, help="a file of rates, in place of the data sheet")
    for name, text, run in (
        ("calibrate", "rates of this CPU", _calibrate),
        ("check", "predicted beside measured", _check),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--folder", type=Path, default=FOLDER, help="of the runs")
        command.add_argument(
            "--reuse", action="store_true", help="runs that are there already are not run again"
        )
        command.add_argument("--output", type=Path, help="JSON of what was found")
        if name == "check":
            command.add_argument("--rates", type=Path, help="of calibrate; default: calibrate first")
    table = commands.add_parser("table", help="the tables of runbooks/sizing.md")
    table.set_defaults(run=_table)
    table.add_argument("--write", action="store_true", help="into the page")
    return parser


def _predict(args: argparse.Namespace) -> int:
    plan = Plan(**{one.name: getattr(args, one.name) for one in fields(Plan)})
    rates = gpu_rates(SHEETS[args.gpu]) if args.rates is None else read_rates(args.rates)
    for line in shown(predict(plan, rates)):
        print(line)
    for line in shown_rates(rates):
        print(line)
    return 0


def shown(found: Prediction) -> list[str]:
    """A prediction in lines."""
    memory = found.memory
    parts = {
        "weights": memory.weights, "optimizer": memory.optimizer, "activations": memory.activations,
        "head": memory.head, "rollout engine": found.engine,
    }  # fmt: skip
    made = found.plan.packs(found.plan.answer)
    return [
        f"memory    {found.peak / 1e9:.1f} GB of a GPU at the peak: "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size),
        f"packing   {made.samples:.1f} samples a forward, {made.fill:.0%} full",
        f"step      {found.time.total:.2f} s: " + where_it_goes(found, least=0.0),
        f"          {found.hours_of_10k:.2f} GPU hours for 10,000 pictures ({found.plan.images_a_step:.0f} a step)",
    ]


def shown_rates(rates: Rates) -> list[str]:
    """Rates in lines, with their sources."""
    told = [(one.name, float(getattr(rates, one.name))) for one in fields(rates) if one.type == "float"]
    return [
        f"rate      {name:<16} {shown_rate(name, value):<22} {rates.sources.get(name, '')}"
        for name, value in told
        if value not in (0.0, float("inf"))
    ]


def _calibrate(args: argparse.Namespace) -> int:
    rates = calibrated(args.folder, reuse=args.reuse)
    write_rates(args.output or args.folder / "rates.json", rates)
    return 0


def calibrated(folder: Path, *, reuse: bool) -> Rates:
    """Rates of this machine from the calibration's runs in `folder`; printed."""
    from scale.fit import CALIBRATION, fitted, load, measure

    print(f"calibration: {len(CALIBRATION)} runs, {load()}", flush=True)
    rates = fitted([measure(trial, folder, reuse=reuse) for trial in CALIBRATION])
    for line in shown_rates(rates):
        print(line, flush=True)
    return rates


def _check(args: argparse.Namespace) -> int:
    from scale.check import BOUND, run_cells
    from scale.fit import CALIBRATION, load, machine

    rates = calibrated(args.folder, reuse=args.reuse) if args.rates is None else read_rates(args.rates)
    rows = run_cells(rates, args.folder, reuse=args.reuse)
    missed = [row for row in rows if not row.holds]
    print(f"{len(rows) - len(missed)} of {len(rows)} within {BOUND:.0%}; {machine()}; {load()}")
    if args.output is not None:
        found = {
            "machine": machine(), "load": load(), "date": datetime.date.today().isoformat(),
            "calibration": len(CALIBRATION), "rows": [{**vars(row), "error": row.error} for row in rows],
        }  # fmt: skip
        write_text(args.output, json.dumps(found, indent=1) + "\n")
    return 1 if missed else 0


def _table(args: argparse.Namespace) -> int:
    if args.write:
        write_page()
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
