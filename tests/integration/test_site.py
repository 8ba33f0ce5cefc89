"""The documentation site: built strictly, and its main pages in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import Browser, needs_chromium

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = ROOT / "runbooks"
pytestmark = pytest.mark.slow

MAIN_PAGES = [
    "overview", "index", "tutorial", "notebooks/quick_start", "sizing", "prepare_data",
    "train_stage1", "watch_a_run", "evaluate_coco", "api", "config", "contributing"
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, of a build without a warning and without a network."""
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [
            sys.executable, "-m", "mkdocs", "build", "--strict",
            "--config-file", ROOT / "tools/docs/mkdocs.yml", "--site-dir", folder,
        ],
        capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def test_every_runbook_is_a_page(site):
    names = {path.relative_to(RUNBOOKS).with_suffix(".html") for path in RUNBOOKS.rglob("*.md")}
    names |= {path.relative_to(RUNBOOKS).with_suffix(".html") for path in RUNBOOKS.rglob("*.ipynb")}
    names = {Path("index.html") if name == Path("README.html") else name for name in names}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert built - names == {Path("overview.html"), Path("changelog.html"), Path("404.html")}
    assert names <= built


def test_every_name_of_the_python_page_is_documented(site):
    page = (site / "api.html").read_text()
    names = re.findall(r"^::: (\S+)$", (RUNBOOKS / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert f'id="{name}"' in page
    assert 'id="coordexp.losses.coord.coord_soft_ce"' in page  # of a whole module
    # a docstring's own sentence
    assert "Look the tokens up in" in page


def test_pages_name_nobody_to_fetch_from(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)",
            page.read_text(),
        )
        assert fetched == [], page


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_main_pages_in_a_browser(site, browser, width):
    for name in MAIN_PAGES:
        seen = browser.visit((site / f"{name}.html").as_uri(), width=width)
        assert (name, seen.complaints, seen.outside, seen.overflow) == (name, [], [], 0)


@needs_chromium
def test_search_works_from_a_folder(site, browser):
    browser.visit((site / "index.html").as_uri(), width=1280)
    browser.type("[data-md-component=search-query]", "coord_soft_ce_w1")
    found = browser.wait_for(
        "[...document.querySelectorAll('.md-search-result__item h1')].map(e => e.textContent).join('|')"
    )
    assert "Run configuration" in found.split("|")


@needs_chromium
def test_the_browser_sees_what_is_wrong_with_a_page(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width:500px">wide</div>'
        '<script>console.error("oh")</script><img src="http://127.0.0.1:9/a.png">'
    )
    seen = browser.visit(page.as_uri(), width=390)
    assert seen.outside == ["http://127.0.0.1:9/a.png"]
    assert any("oh" in complaint for complaint in seen.complaints)
    assert any("not loaded" in complaint for complaint in seen.complaints)
    assert seen.overflow >= 110
    assert browser.visit(page.as_uri(), width=1280).overflow == 0
