"""`coordexp data view`: every image of a data set with its objects, and nothing asked of a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, needs_chromium

from coordexp.cli.main import main
from coordexp.eval.gallery import thumbnails
from coordexp.files import write_jsonl

NUM_IMAGES = 30


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """30 noisy pictures; picture n holds n % 4 objects, a triangle among them where there are three."""
    folder = tmp_path_factory.mktemp("view")
    rng = np.random.default_rng(0)
    rows = []
    for n in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        objects = [{"desc": "cat <b>", "bbox_2d": [100 * k, 0, 100 * k + 90, 900]} for k in range(n % 4)]
        if n % 4 == 3:
            objects[-1] = {"desc": "dog", "poly": [0, 0, 999, 0, 999, 999]}
        rows.append({"images": [f"{n}.png"], "width": 120, "height": 90, "objects": objects})
    write_jsonl(folder / "train.jsonl", rows)
    assert main(["data", "view", str(folder / "train.jsonl"), "--out", str(folder / "out")]) == 0
    return folder / "out" / "train.html"


def gallery_of(page: Path) -> dict:
    found = re.search(r'id="gallery-data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])


def test_every_object_is_on_the_page(page):
    gallery = gallery_of(page)
    assert gallery["descs"] == ["cat <b>", "dog"]
    boxes = [card["panels"][0]["boxes"] for card in gallery["cards"]]
    assert [len(of_image) for of_image in boxes] == [n % 4 for n in range(NUM_IMAGES)]
    assert boxes[3][2][1] == 1
    assert boxes[3][2][8] == [
        [0, 0, 992, 0, 992, 742]
    ]  # of 120 x 90 pixels, in thousandths of the longer side
    assert all(card["src"].startswith("data:image/webp;base64,") for card in gallery["cards"])


def test_thumbnails_share_their_room(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    paths = [tmp_path / f"{n}.png" for n in range(12)]
    monkeypatch.setattr(thumbnails, "THUMBNAIL_BYTES", 12 * 3200)  # 5,000 pictures have 3,200 bytes each
    sources = thumbnails.embedded([*paths, None, tmp_path / "none.png"], [True, *[False] * 13])
    assert sources[12:] == [None, None]
    assert sum(map(len, sources[1:12])) <= 12 * 3200
    assert max(map(len, sources[1:12])) > 1200  # not far smaller than needed
    assert len(sources[0]) > 20_000


@pytest.mark.slow
@needs_chromium
def test_a_browser_filters_and_turns_pages(page, tmp_path):
    with Browser(tmp_path) as browser:
        for width in (1280, 390):
            seen = browser.visit(f"file://{page}", width=width)
            assert (seen.complaints, seen.outside, seen.overflow) == ([], [], 0)
            drawn = "document.querySelectorAll('#cards figure').length"
            assert browser.evaluate(drawn) == 24
            browser.evaluate("document.querySelector('.pager [data-turn=\"1\"]').click()")
            assert browser.evaluate(drawn) == 6
            assert browser.evaluate("document.querySelector('.pager .place').textContent") == "25 to 30 of 30"
            for field, value, number in (
                ("desc", "1", 7),
                ("least", "3", 7),
                ("most", "2", 0),
                ("desc", "", 0),
            ):
                browser.evaluate(f"document.getElementById('{field}').value = '{value}'")
                browser.evaluate(f"document.getElementById('{field}').dispatchEvent(new Event('change'))")
                assert browser.evaluate(drawn) == number
            browser.evaluate("document.getElementById('all').click()")
            assert browser.evaluate(drawn) == 24
            assert browser.evaluate("document.querySelectorAll('#cards b').length") == 0
