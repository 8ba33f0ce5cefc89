"""Random files: an answer or one line that says why, never anything else, in 2 GiB (tools/bench tries 20,000)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.annotated import noise

from coordexp.data.formats.options import ImportOptions
from coordexp.data.formats.readers.builder import Faults
from coordexp.data.formats.readers.sources import read_sources
from coordexp.errors import CoordExpError

PROGRAM = Path(__file__).parents[4] / "tools" / "bench" / "fuzz_annotations.py"


@pytest.mark.slow
def test_random_json_is_evaluated_and_imported_or_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--inputs", "240", "--seed", "7"],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    ends = dict(re.findall(r"^(.*: exit [02]) +(\d+)$", done.stdout, flags=re.MULTILINE))
    assert sum(map(int, ends.values())) >= 240
    for kind in ("eval bbox", "eval segm", "from-coco", "from-lvis"):  # both ends were seen of each
        assert {f"{kind}: exit {status}" for status in (0, 2)} <= ends.keys()


FILES: dict[str, tuple[str, str, str]] = {
    "yolo labels": ("yolo", "labels/a.txt", "0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.5 0.2 0.5 0.8\n"),
    "yolo config": ("yolo", "data.yaml", "path: .\ntrain: images\nnames: [cat, dog]\n"),
    "voc": (
        "voc",
        "Annotations/a.xml",
        "<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object><name>cat</name>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>",
    ),
    "cvat": (
        "cvat",
        "annotations.xml",
        '<annotations><image id="0" name="a.png" width="40" height="30"><box label="cat" xtl="1" ytl="2" xbr="30" '
        'ybr="20"/><polygon label="dog" points="1,2;30,4;5,20"/></image></annotations>',
    ),
    "labelme": (
        "labelme",
        "a.json",
        '{"imagePath": "a.png", "imageWidth": 40, "imageHeight": 30, "shapes": [{"label": "cat", "points": [[1, 2], '
        '[30, 20]], "shape_type": "rectangle", "group_id": null}]}',
    ),
    "jsonl": (
        "jsonl",
        "a.jsonl",
        '{"images": ["a.png"], "width": 40, "height": 30, "objects": [{"desc": "cat", "bbox_2d": [1, 2, 300, 400]}]}\n',
    ),
}
PIECES = st.sampled_from(
    ["", "nan", "inf", "-1", "1e999", "9" * 400, "null", "true", "[]", "{}", "[" * 2000, "<x/>", "</", "&a;", "\0",
     "\n", " ", "../../x", "é", "0", "99", "0.5", '"', ":", "- a", "\ufeff"]
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """For each kind of file a right data set."""
    made: dict[str, Path] = {}
    for kind, (_, name, text) in FILES.items():
        folder = made[kind] = tmp_path_factory.mktemp(kind.split()[0])
        for picture in ("a.png", "images/a.png"):
            noise(folder / picture, (40, 30))
        others = [FILES["yolo config"], FILES["yolo labels"]] if kind.startswith("yolo") else []
        for _, path, content in [*others, ("", name, text)]:
            (folder / path).parent.mkdir(exist_ok=True, parents=True)
            (folder / path).write_text(content)
    return made.__getitem__


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), PIECES), max_size=3),
    raw=st.binary(max_size=4),
)
def test_damaged_files_of_other_formats_are_read_or_refused(folders, kind: str, cuts, raw: bytes):
    format_name, name, text = FILES[kind]
    for place, removed, piece in cuts:
        start = int(place * len(text))
        text = text[:start] + piece + text[start + removed :]
    content = text.encode()
    (folders(kind) / name).write_bytes(content[:40] + raw + content[40:] if len(raw) > 2 else content)
    for faults in (Faults(), Faults(collect=True)):
        try:
            sources = read_sources(folders(kind), ImportOptions(), format_name=format_name, faults=faults)
        except CoordExpError:
            continue
        assert all(len(source.pictures) == len(source.dataset.image_ids) for source in sources)
