"""Feed random annotation files to `coordexp eval --format coco` and the imports, and stop at the first that goes wrong.

    OMP_NUM_THREADS=1 python tools/bench/fuzz_annotations.py [--inputs 20000] [--seed 0]

Every input starts as a small right data set; values are then replaced, removed, doubled and wrapped by odd ones, or
the text itself is damaged. What must hold: the exit status is 0 or 2 and nothing is raised; with 2 there is one line
that says why; with 0 the numbers are finite and the records pass the reader of training. Address space is limited to
2 GiB, so that an input which takes more fails. An input that goes wrong is made as small as it can be and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.cli.main import main
from coordexp.codec.records import read_jsonl
from coordexp.eval.coco.evaluate import ENGINES

LIMIT = 2 << 30
LVIS = "by the rules of LVIS"
WIDTH, HEIGHT = 64, 48
TRIANGLE = [10.0, 10.0, 50.0, 12.0, 20.0, 40.0]
RUN_LENGTHS = {"size": [HEIGHT, WIDTH], "counts": [100, 200, HEIGHT * WIDTH - 300]}
PACKED = {"size": [HEIGHT, WIDTH], "counts": "T3X6df2"}

GT: dict[str, Any] = {
    "info": {"year": 2020},
    "images": [
        {"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.png", "neg_category_ids": [2],
         "not_exhaustive_category_ids": [1]},
        {"id": 2, "width": WIDTH, "height": HEIGHT, "file_name": "b.png", "coco_url": "http://x/val/b.png",
         "neg_category_ids": [], "not_exhaustive_category_ids": []},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 600.5, "iscrowd": 0,
         "segmentation": [TRIANGLE]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1.5, 2, 9, 30], "area": 200, "iscrowd": 1,
         "segmentation": RUN_LENGTHS},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [30, 20, 20, 20], "segmentation": [TRIANGLE, TRIANGLE]},
    ],
    "categories": [
        {"id": 1, "name": "cat", "synonyms": ["cat", "kitty"], "frequency": "r"},
        {"id": 2, "name": "dog_(animal)", "supercategory": "animal", "frequency": "f"},
    ],
}  # fmt: skip
PREDS: list[dict[str, Any]] = [
    {"image_id": 1, "category_id": 1, "bbox": [11, 10, 40, 30], "score": 0.75, "segmentation": [TRIANGLE]},
    {"image_id": 1, "category_id": 2, "bbox": [1, 2, 9, 30], "score": 0.5},
    {"image_id": 2, "category_id": 1, "bbox": [30.25, 20, 20, 20], "score": 1, "segmentation": PACKED},
]

ODD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 0.0, 1.0, 2, 0.5, -0.0, 1e-320, 1e9, 1e10, 1e17, 1e300, -1e308, 2**31, 2**53 + 1,
        2**63, 2**64, 10**30, 10**400, math.nan, math.inf, -math.inf, "", " ", "0", "1", "false", "YES", "8000", "1e5",
        "1,5", "0x1f", "nan", "٣", "a.png", "../a.png", "/etc/hostname", "x" * 300, "\0", "\ud800", "cafe\u0301",
        "café", "cat", "\u200b", [], {}, [[]], [None], [1], [1, 2], [1, 2, 3, 4], [0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4],
        ["1", "2", "3", "4"], [1, 2, -3, 4], [1e8, 1e8, 1e8, 1e8], {"size": [48, 64]}, {"counts": "0"},
        {"size": [48, 64], "counts": "PPPP"}, {"size": [48, 64], "counts": [0, 3072]}, {"size": [9, 9], "counts": [81]},
        {"size": [10**6, 10**6], "counts": [10**12]}, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6]], [[[1, 2], [3, 4], [5, 6]]],
        [[1, 2], [30, 4], [5, 60]], [[1, 2, 1e9, 4, 5, 6]], [[v for i in range(400) for v in (i, 1e9 * (i % 2))]],
        [[1, 2, math.nan, 4, 5, 6]], [[1, 2, "3", 4, 5, 6]], [[1, 2, None, 4, 5, 6]],
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    ODD | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "bbox", "size", "counts", "name", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside `value`."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [place for key, inner in entries for place in ((*here, key), *paths_of(inner, (*here, key)))]


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """A copy in which up to four values are not what they were."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(0, 4))):
        places = paths_of(value)
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        holder = value
        for step in above:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "replace", "remove", "double", "wrap", "as text", "extra"]))
        if what == "replace":
            holder[key] = copy.deepcopy(draw(ANYTHING))  # values of `ODD` are shared
        elif what == "remove":
            del holder[key]
        elif what == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == "wrap":
            holder[key] = [holder[key]]
        elif what == "as text":
            holder[key] = str(holder[key])[:50]
        elif what == "extra" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["area", "segmentation", "bbox", "id", "deep"]))] = copy.deepcopy(
                draw(ANYTHING)
            )
    return value


@st.composite
def texts(draw: st.DrawFn, original: Any) -> bytes:
    """The bytes of a file: a changed data set, anything at all, or either with damaged text."""
    value = draw(changed(original)) if draw(st.integers(0, 9)) else draw(ANYTHING)
    content = json.dumps(value).encode()
    damage = draw(
        st.sampled_from(
            ["", "", "", "", "bom", "cut", "insert", "deep", "digits", "lines", "latin", "utf-16"]
        )
    )
    place = draw(st.integers(0, len(content)))
    if damage == "bom":
        return b"\xef\xbb\xbf" + content
    if damage == "cut":
        return content[:place]
    if damage == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=3)) + content[place:]
    if damage == "deep":
        return content.replace(b"null", b"[" * draw(st.sampled_from([50, 900, 5000, 100_000])), 1)
    if damage == "digits":
        return content.replace(b"10", b"9" * draw(st.sampled_from([20, 400, 5000])), 1)
    if damage == "lines":
        return b"\n".join(
            json.dumps(entry).encode() for entry in (value if isinstance(value, list) else [value] * 2)
        )
    if damage in ("latin", "utf-16"):
        return content.decode("utf-8", errors="replace").encode(
            "latin-1" if damage == "latin" else damage, errors="replace"
        )
    return content


class Tried:
    """What became of the inputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: Counter[str] = Counter()
        pictures = folder / "img"
        (pictures / "val").mkdir(parents=True)
        for name, color in (("a.png", "red"), ("b.png", "blue"), ("val/b.png", "green")):
            Image.new("RGB", (WIDTH, HEIGHT), color).save(pictures / name)

    def run(self, kind: str, argv: list[str]) -> int:
        """The exit status of a command; AssertionError for one that is neither 0 nor 2, or 2 without one line."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
        gc.enable()  # `coordexp eval` switches it off, for a process that evaluates once
        self.ends[f"{kind}: exit {status}"] += 1
        assert status in (0, 2), status
        assert status == 0 or len(err.getvalue().splitlines()) == 1, err.getvalue()
        return status

    def evaluate(self, gt: bytes, preds: bytes, iou_type: str, engine: str) -> None:
        """Try an evaluation. engine: or LVIS."""
        for name, content in (("gt.json", gt), ("preds.json", preds)):
            (self.folder / name).write_bytes(content)
        output = self.folder / "out"
        argv = [
            "eval",
            "--format",
            "coco",
            "--gt",
            f"{self.folder}/gt.json",
            "--pred",
            f"{self.folder}/preds.json",
        ]
        argv += [
            "--output",
            str(output),
            "--iou-type",
            iou_type,
            *(["--lvis"] if engine == LVIS else ["--no-lvis", "--engine", engine]),
            "--image-root",
            f"{self.folder}/img",
        ]
        if self.run(f"eval {iou_type}", argv) == 0:
            metrics = json.loads((output / "metrics.json").read_text(), parse_constant=_refuse)
            assert -1 <= metrics["AP"] <= 1
            assert 0 <= metrics["f1_at_50"] <= 1
            json.loads((output / "coco_gt.json").read_text(), parse_constant=_refuse)

    def convert(self, gt: bytes, command: list[str]) -> None:
        """Try an import."""
        (self.folder / "gt.json").write_bytes(gt)
        output = self.folder / "o.jsonl"
        output.unlink(missing_ok=True)
        argv = [*command, "--output", str(output), "--annotations", f"{self.folder}/gt.json"]
        if self.run(command[0], ["data", *argv]) == 0:
            assert read_jsonl(output)
        else:
            assert not output.exists()


def _refuse(name: str) -> None:
    raise AssertionError(f"wrote {name}")


def fuzz(inputs: int, random_seed: int, folder: Path) -> Counter[str]:
    """Try half of the inputs on evaluation and half on imports; returns how they ended."""
    tried = Tried(folder)
    check = settings(
        max_examples=(inputs + 1) // 2, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    roots = ([], ["--image-root", str(folder / "img")])

    @check
    @seed(random_seed)
    @given(
        gt=texts(GT), preds=texts(PREDS), iou_type=st.sampled_from(["bbox", "bbox", "segm"]),
        engine=st.sampled_from([*ENGINES, LVIS]), which=st.integers(0, 2),
    )  # fmt: skip
    def evaluate(gt: bytes, preds: bytes, iou_type: str, engine: str, which: int) -> None:
        # Most inputs have one right side, so that the other one is looked at to its end.
        right_gt, right_preds = json.dumps(GT).encode(), json.dumps(PREDS).encode()
        tried.evaluate(right_gt if which == 0 else gt, right_preds if which == 1 else preds, iou_type, engine)

    @check
    @seed(random_seed)
    @given(
        gt=texts(GT), command=st.sampled_from([["from-coco"], ["from-lvis"], ["from-lvis", "--names", "synonyms"]]),
        root=st.sampled_from(roots), polygons=st.booleans(),
        policy=st.sampled_from([[], ["--missing-images=skip", "--bad-images=skip"], ["--missing-images=keep"]]),
    )  # fmt: skip
    def convert(gt: bytes, command: list[str], root: list[str], polygons: bool, policy: list[str]) -> None:
        tried.convert(gt, [*command, *root, *policy, *(["--polygons"] if polygons else [])])

    evaluate()
    convert()
    return tried.ends


def run_program() -> None:
    """Parse the command line, try the inputs and print how they ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    started = time.perf_counter()
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        ends = fuzz(args.inputs, args.seed, Path(folder))
    for end, count in sorted(ends.items()):
        print(f"{end:24}{count:8}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{sum(ends.values())} inputs in {time.perf_counter() - started:.0f} s, at most {peak:.2f} GiB")


if __name__ == "__main__":
    run_program()
