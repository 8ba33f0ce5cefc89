"""What it costs to open a data file: the first time, later, and in every further process.

    python tools/bench/bench_data.py                      # 118,000 records of 7 objects, about 700 MB of pictures
    python tools/bench/bench_data.py --records 10000

The bench writes a data file and its pictures (a path for every record; `--pictures` different JPEG files behind them),
then measures, each in a process of its own:

    rows in a list   every process reads every line, looks at every picture and keeps all rows as Python objects
    first start      the file is checked with all cores and written as an Arrow table
    second start     open the table, hand it through ms-swift's `load_dataset`, and make one training row
    a further process   what its memory grows by when it opens the table and reads 2,000 rows of it in random order

Times are in ms a record and core: CPU seconds of the process and its children, and wall seconds times cores, over the
records. Memory is what belongs to the process alone (unique set size), and with mapped pages (RSS). Imports
are not counted. Exit status 1 when a bound is missed: 0.25 ms of CPU, 2 s, 60 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
MOST_MS, MOST_S, MOST_MB = 0.25, 2.0, 60.0
DESCS = ["person", "traffic light", "dining table", "cup", "sports ball", "handbag", "chair"]
ROWS_READ = 2000


def write_data(folder: Path, num_records: int, num_pictures: int) -> Path:
    """`data.jsonl` and a picture of 640 x 480 for every record, hard links to a few files."""
    draws = np.random.default_rng(0)
    (folder / "stored").mkdir()
    for index in range(num_pictures):
        coarse = Image.fromarray(draws.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        coarse.resize((640, 480)).save(folder / "stored" / f"{index}.jpg", quality=80)
    with (folder / "data.jsonl").open("w") as lines:
        for index in range(num_records):
            name = f"pictures/{index // 1000:03d}/{index:06d}.jpg"
            if index % 1000 == 0:
                (folder / name).parent.mkdir(parents=True)
            os.link(folder / "stored" / f"{index % num_pictures}.jpg", folder / name)
            corners = np.sort(
                draws.permuted(np.tile(np.arange(1000), (14, 1)), axis=1)[:, :2], axis=1
            ).reshape(7, 4)
            objects = [
                {"desc": desc, "bbox_2d": [int(x1), int(y1), int(x2), int(y2)]}
                for desc, (x1, x2, y1, y2) in zip(DESCS, corners, strict=True)
            ]
            record = {"images": [name], "width": 640, "height": 480, "objects": objects}
            lines.write(json.dumps({**record, "metadata": {"image_id": index}}) + "\n")
    return folder / "data.jsonl"


class Meter:
    """Time and memory of a block, in this process and its children."""

    def __enter__(self) -> Meter:
        self._memory, self._cpu, self._wall = _memory(), _cpu(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, _cpu() - self._cpu
        self.unique_mb, self.resident_mb = (
            (after - before) / 1e6 for after, before in zip(_memory(), self._memory, strict=True)
        )


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _memory() -> tuple[int, int]:
    import psutil

    full = psutil.Process().memory_full_info()
    return full.uss, full.rss


def rows_in_a_list(data: str) -> Meter:
    """As it was: all rows of the file, and a `datasets.Dataset` of them."""
    from datasets import Dataset

    from coordexp.codec.records import iter_jsonl
    from coordexp.config.schema.prompt import Prompt
    from coordexp.data.dataset import RowMaker

    maker = RowMaker(Prompt())
    with Meter() as meter:
        rows = [maker.row(record) for record in iter_jsonl(data, require_images=True)]
        kept = rows, Dataset.from_list(rows)
    assert len(kept[0]) == len(kept[1])
    return meter


def first_start(data: str) -> Meter:
    from coordexp.data.store.open import open_records

    with Meter() as meter:
        open_records(data)
    return meter


def second_start(data: str) -> Meter:
    from swift.dataset import load_dataset

    from coordexp.config.schema.prompt import Prompt
    from coordexp.data.dataset import read_training_rows
    from coordexp.swift_bridge.dataset import register_jsonl

    with Meter() as meter:
        register_jsonl([data], lambda path: read_training_rows(path, Prompt()))
        rows, _ = load_dataset([data], shuffle=True)
        assert rows[0]["messages"]
    return meter


def further_process(data: str) -> Meter:
    from coordexp.config.schema.prompt import Prompt
    from coordexp.data.dataset import read_training_rows

    with Meter() as meter:
        rows = read_training_rows(data, Prompt())
        draws = random.Random(0)
        for _ in range(ROWS_READ):
            assert rows[draws.randrange(len(rows))]["messages"]
    return meter


KINDS: dict[str, Callable[[str], Meter]] = {
    "rows in a list": rows_in_a_list,
    "first start": first_start,
    "second start": second_start,
    "a further process": further_process,
}


def measure(kind: str, data: Path, cache: Path) -> dict[str, float]:
    """`KINDS[kind]` in a process of its own."""
    env = {**os.environ, "COORDEXP_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--kind", kind, "--data", str(data)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(found: dict[str, dict[str, float]], num_records: int, cores: int) -> list[str]:
    """Print the table; what misses its bound."""
    print(f"{'':>18} {'wall s':>8} {'CPU s':>8} {'ms CPU':>8} {'ms core':>8} {'own MB':>8} {'RSS MB':>8}")
    for kind, numbers in found.items():
        cpu_ms, core_ms = (1000 * s / num_records for s in (numbers["cpu_s"], numbers["wall_s"] * cores))
        print(
            f"{kind:>18} {numbers['wall_s']:8.2f} {numbers['cpu_s']:8.2f} {cpu_ms:8.3f} {core_ms:8.3f} "
            f"{numbers['unique_mb']:8.1f} {numbers['resident_mb']:8.1f}"
        )
    missed = []
    if 1000 * found["first start"]["cpu_s"] / num_records > MOST_MS:
        missed.append(f"the first start takes more than {MOST_MS} ms of CPU a record")
    if found["second start"]["wall_s"] > MOST_S:
        missed.append(f"the second start takes more than {MOST_S} s")
    if found["a further process"]["unique_mb"] > MOST_MB:
        missed.append(f"a further process needs more than {MOST_MB} MB of its own")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=118_000)
    parser.add_argument(
        "--pictures", type=int, default=2000, help="different files behind the records' paths"
    )
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        meter: Any = KINDS[args.kind](args.data)
        names = ("wall_s", "cpu_s", "unique_mb", "resident_mb")
        print(json.dumps({name: getattr(meter, name) for name in names}))
        return 0
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench_data.") as folder:
        data = write_data(Path(folder), args.records, min(args.pictures, args.records))
        megabytes = data.stat().st_size / 1e6
        print(f"{args.records} records of 7 objects, {megabytes:.0f} MB of text, {cores} cores")
        found = {kind: measure(kind, data, Path(folder) / "cache") for kind in KINDS}
        table = next((Path(folder) / "cache").glob("records/*/*/records.arrow"))
        print(f"the table has {table.stat().st_size / 1e6:.0f} MB")
    missed = report(found, args.records, cores)
    print("\n".join(missed) or "all within their bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
