"""The demo page: self-contained, escaped, complete."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from coordexp.errors import ContractError
from coordexp.eval.report.demo_page import MEASURES, write_demo_page
from coordexp.eval.report.page import mark_coord_tokens

MODEL_TEXT = (
    '{"objects": [{"desc": "<script>&\u00e9", "bbox_2d": [<|coord_1|>, <|coord_999|>, 5, 6]}]}<|im_end|>'
)


class _Page(HTMLParser):
    """Collects tags, attributes and the text of table cells and <pre> blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.pre: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed, in order

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre[-1] += data
        elif self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data.strip()


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def _write(out_dir: Path, picture: Path, **changes) -> str:
    item = {"title": "a.png", "picture": picture, "text": MODEL_TEXT, "status": "parsed", "ok": True}
    arguments = {
        "headline": [
            {"name": "untrained", "f1_50": 0.01, "bin_error": 247.31},
            {"name": "trained", "f1_50": 0.9, "bin_error": 12.0, "map": 0.5, "seconds": 400.4},
        ],
        "curves": [picture],
        "gallery": [item, {**item, "title": "b.png", "ok": False, "status": "truncated"}],
        "notes": {"title": "Demo <1>", "summary": "Small.", "commands": ["make demo", "make test"]},
    }
    page = write_demo_page(out_dir, **{**arguments, **changes})
    assert page == out_dir / "index.html"
    return page.read_text(encoding="utf-8")


def test_page_embeds_every_picture_and_asks_for_nothing(tmp_path, picture):
    html = _write(tmp_path / "out", picture)
    sources = [attrs["src"] for tag, attrs in _Page(html).tags if tag == "img"]
    assert len(sources) == 3  # one curve, two gallery entries
    for source in sources:
        prefix, encoded = source.split(",")
        assert prefix == "data:image/png;base64"
        assert base64.b64decode(encoded) == picture.read_bytes()
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_model_text_appears_verbatim_with_coordinates_marked(tmp_path, picture):
    page = _Page(_write(tmp_path, picture))
    assert page.pre == [MODEL_TEXT, MODEL_TEXT, "make demo\nmake test"]
    assert [
        attrs.get("class") for tag, attrs in page.tags if tag == "span" and attrs.get("class") == "coord"
    ] == ["coord"] * 4


def test_only_coordinate_tokens_are_marked():
    assert mark_coord_tokens("<|coord_12|><|coord_|><|im_end|>") == (
        '<span class="coord">&lt;|coord_12|&gt;</span>&lt;|coord_|&gt;&lt;|im_end|&gt;'
    )


def test_table_has_one_row_per_measure_and_one_column_per_run(tmp_path, picture):
    header, *rows = _Page(_write(tmp_path, picture)).cells
    assert header == ["", "untrained", "trained"]
    assert [row[0] for row in rows] == [measure.title for measure in MEASURES]
    table = {row[0]: row[1:] for row in rows}
    assert table["F1 at IoU 0.5"] == ["0.010", "0.900"]
    assert table["COCO mAP"] == ["\u2013", "0.500"]  # not measured is a dash, not 0
    assert table["Coordinate error"] == ["247.3", "12.0"]
    assert table["Seconds"] == ["\u2013", "400"]


def test_best_cells_are_the_highest_score_and_the_lowest_error(tmp_path, picture):
    html = _write(tmp_path, picture)
    assert re.findall(r'<td class="best">([^<]*)</td>', html) == ["0.900", "12.0"]


def test_page_shows_before_and_after_of_the_main_measures(tmp_path, picture):
    html = _write(tmp_path, picture)
    pairs = re.findall(r'<span class="before">(.*?) \u2192</span> <span class="after">(.*?)</span>', html)
    assert pairs == [("0.010", "0.900"), ("\u2013", "0.500"), ("247.3", "12.0")]
    assert 'class="before"' not in _write(tmp_path, picture, headline=[{"name": "only", "f1_50": 0.5}])


def test_facts_are_optional_and_escaped(tmp_path, picture):
    notes = {"title": "t", "summary": "s", "commands": [], "facts": {"device": "<2 cores>"}}
    assert "<dt>device</dt><dd>&lt;2 cores&gt;</dd>" in _write(tmp_path, picture, notes=notes)
    html = _write(tmp_path, picture)
    assert "<dl>" not in html
    assert "<title>Demo &lt;1&gt;</title>" in html


def test_bad_input_is_named_and_the_old_page_stays(tmp_path, picture):
    before = _write(tmp_path, picture)
    with pytest.raises(ContractError, match="no headline row"):
        _write(tmp_path, picture, headline=[])
    with pytest.raises(ContractError, match="has f1: expected name and any of f1_50"):
        _write(tmp_path, picture, headline=[{"name": "x", "f1": 1.0}])
    with pytest.raises(ContractError, match=r"missing\.png does not exist"):
        _write(tmp_path, picture, curves=[tmp_path / "missing.png"])
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == before
