"""One run that measures what only a GPU shows, each figure beside a named baseline of the same run.

    python tools/bench/gpu.py --output gpu.json             # CUDA, at most 6 minutes
    python tools/bench/gpu.py --from gpu.json --write       # its section of runbooks/performance.md
    python tools/bench/gpu.py --device cpu --small          # every part at a tiny size; never written to the page

It runs the other programs of this folder, each in a process of its own: bench_head, bench_device, bench_metrics,
bench_rollout, bench_readout. A part that needs ms-swift or vLLM is left out by name where they are missing, a part that
fails by its last words, and what no time is left for as that.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "runbooks" / "performance.md"
BEGIN, END = "<!-- written by tools/bench/gpu.py: begin -->", "<!-- written by tools/bench/gpu.py: end -->"
PACKAGES = ("torch", "transformers", "ms-swift", "vllm", "flash-attn", "liger-kernel")
MODULES = {"ms-swift": "swift", "vLLM": "vllm"}
BUDGET_S = 350.0
PART_S = 150.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One program and its arguments on a GPU and at a tiny size; `needs` are names in MODULES."""

    title: str
    program: str
    arguments: Sequence[str]
    small: Sequence[str]
    needs: Sequence[str] = ()


HEAD_SMALL = ("--lengths", "96", "--hidden", "16", "--vocab", "1800", "--repeats", "1")
ROLLOUT = (
    "--preset",
    "demo",
    "--requests",
    "48",
    "--batch-size",
    "24",
    "--rounds",
    "3",
    "--dtype",
    "bfloat16",
)
ROLLOUT_SMALL = ("--requests", "2", "--batch-size", "2", "--rounds", "1", "--max-new-tokens", "8")
PARTS = (
    Part(
        "Head, forward and backward", "bench_head.py",
        ("--lengths", "12288", "--hidden", "2048", "--vocab", "151936", "--dtype", "bfloat16", "--repeats", "3"),
        HEAD_SMALL,
    ),
    Part("Beside a step", "bench_device.py", (), ("--small",)),
    Part(
        "Stage-1 step", "bench_metrics.py", ("--rounds", "10"), ("--rounds", "1", "--preset", "nano"), ("ms-swift",)
    ),
    Part(
        "Rollouts by transformers", "bench_rollout.py", ("--backends", "hf", *ROLLOUT),
        ("--backends", "hf", *ROLLOUT_SMALL), ("ms-swift",),
    ),
    Part(
        "Coordinates at the median", "bench_readout.py", ("--backends", "hf", *ROLLOUT),
        ("--backends", "hf", *ROLLOUT_SMALL), ("ms-swift",),
    ),
    Part(
        "Rollouts by vLLM, and weight pushes", "bench_rollout.py", ("--backends", "vllm", *ROLLOUT),
        ("--backends", "vllm", *ROLLOUT_SMALL), ("ms-swift", "vLLM"),
    ),
)  # fmt: skip


def measure(part: Part, *, device: str, small: bool, most_s: float) -> Result:
    """The rows of a part, or why it has none."""
    missing = [name for name in part.needs if importlib.util.find_spec(MODULES[name]) is None]
    if missing:
        return left_out(part, f"needs {' and '.join(missing)}")
    if most_s < 1:
        return left_out(part, f"no time left of {BUDGET_S:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        arguments = part.small if small else part.arguments
        command = [
            sys.executable,
            str(ROOT / "tools" / "bench" / part.program),
            "--device",
            device,
            "--json",
            str(rows),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "HF_HUB_OFFLINE": "1",
        }
        started = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *arguments],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=most_s,
            )
        except subprocess.TimeoutExpired:
            return left_out(part, f"not done after {most_s:.0f} s")
        if not rows.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return left_out(part, f"exit {done.returncode}: {said[-1][:300] if said else 'no message'}")
        found = json.loads(rows.read_text())
    return {"part": part.title, "seconds": round(time.monotonic() - started, 1), "rows": found}


def left_out(part: Part, reason: str) -> Result:
    return {"part": part.title, "rows": [{"left_out": reason}]}


def where(device: str) -> dict[str, Any]:
    """Device, versions and date."""
    import torch

    name = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {"device": name, "versions": versions(), "date": datetime.date.today().isoformat()}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def section(found: Result) -> str:
    """The Markdown between the markers."""
    lines = [
        f"{found['device']}; {', '.join(f'{name} {version}' for name, version in found['versions'].items())}; "
        f"{found['date']}.",
        "",
        "| | measured | beside | that takes | ratio |",
        "|---|---|---|---|---|",
    ]
    for part in found["parts"]:
        for row in part["rows"]:
            lines.append(table_line(part["part"], row))
    return "\n".join(lines)


def table_line(title: str, row: Result) -> str:
    if "left_out" in row:
        return f"| {title} | left out: {row['left_out'].replace('|', '/')} | | | |"
    ratios = ", ".join(f"{ratio:.3g} of the {of}" for of, ratio in row["ratios"].items())
    return f"| {title} | {row['what']}: {row['found']} | {row['against']} | {row['baseline']} | {ratios} |"


def with_section(page: str, found: Result) -> str:
    """The page with its section made anew.

    Raises SystemExit for figures that are no GPU's, and for a page without the two markers.
    """
    if found["kind"] != "cuda" or found["small"]:
        raise SystemExit(
            "--write: these figures are of a CPU or of tiny sizes; the page holds those of a GPU at full size. Measure "
            "there with --output FILE, then write with --from FILE --write."
        )
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(f"{PAGE}: expected one {BEGIN} and one {END} after it")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{section(found)}\n{END}{rest.split(END)[1]}"


def run(device: str, *, small: bool, only: Sequence[str]) -> Result:
    """Measure every part, one after the other, within BUDGET_S."""
    end, parts = time.monotonic() + BUDGET_S, []
    for part in PARTS:
        if only and part.program.removesuffix(".py") not in only:
            continue
        parts.append(measure(part, device=device, small=small, most_s=min(PART_S, end - time.monotonic())))
        for row in parts[-1]["rows"]:
            print(table_line(part.title, row), flush=True)
    return {"kind": device, "small": small, **where(device), "parts": parts}


def write(path: Path, text: str) -> None:
    """Whole or not at all; without coordexp.files, whose packages a bare machine may lack."""
    path.with_suffix(".unfinished").write_text(text, encoding="utf-8")
    path.with_suffix(".unfinished").replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, which say nothing of speed")
    parser.add_argument(
        "--only", nargs="*", default=(), metavar="PROGRAM", help="bench_head, ...; default: all"
    )
    parser.add_argument("--output", type=Path, help="JSON of everything")
    parser.add_argument("--from", dest="earlier", type=Path, help="such a JSON, instead of measuring")
    parser.add_argument("--write", action="store_true", help="write the section of runbooks/performance.md")
    parser.add_argument("--page", type=Path, default=PAGE, help="another page to write it in")
    args = parser.parse_args(argv)
    if args.earlier is not None:
        found = json.loads(args.earlier.read_text())
    else:
        found = run(args.device, small=args.small, only=args.only)
    if args.output is not None:
        write(args.output, json.dumps(found, indent=1))
    if args.write:
        write(args.page, with_section(args.page.read_text(encoding="utf-8"), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
