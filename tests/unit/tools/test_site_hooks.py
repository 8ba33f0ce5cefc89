"""What tools/docs makes of pages: links, diagrams, notebooks, docstrings."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[3]


def tool(name: str) -> ModuleType:
    """A file of tools/docs as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_docs_{name}", ROOT / f"tools/docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, docstrings = tool("hooks"), tool("docstrings")


@pytest.fixture
def site(monkeypatch) -> MkDocsConfig:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    return load_config(str(ROOT / "tools/docs/mkdocs.yml"), plugins=[])


def on_site(markdown: str, at: str, site: MkDocsConfig) -> tuple[str, Files]:
    """The Markdown of the page `at` after the hooks, and the files that the site has then."""
    file = File(at, None, site.site_dir, use_directory_urls=False)
    file.content_string = markdown
    files = Files([file])
    return site.plugins.on_page_markdown(
        markdown, page=Page(None, file, site), config=site, files=files
    ), files


@pytest.mark.parametrize(
    ("at", "link", "expected"),
    [
        ("tutorial.md", "prepare_data.md#look-before-training", "prepare_data.md#look-before-training"),
        ("tutorial.md", "../README.md", "overview.md"),
        ("notebooks/a.md", "../tutorial.md", "../tutorial.md"),
        ("notebooks/a.md", "../../CHANGELOG.md", "../changelog.md"),
        ("tutorial.md", "../configs/demo/stage1.yaml", "files/configs/demo/stage1.yaml.txt"),
        ("overview.md", "runbooks/study.md", "study.md"),
        ("overview.md", "CHANGELOG.md", "changelog.md"),
        ("overview.md", "LICENSE", "files/LICENSE.txt"),
        ("tutorial.md", "../configs/none.yaml", "../configs/none.yaml"),  # mkdocs calls it broken
        ("tutorial.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("tutorial.md", "#here", "#here"),
    ],
)
def test_a_link_to_a_file_of_the_repository_leads_to_its_place_on_the_site(at, link, expected, site):
    text, _ = on_site(f"See [this]({link}).", at, site)
    assert text == f"See [this]({expected})."


def test_a_linked_file_outside_of_the_runbooks_is_copied_once(site):
    _, files = on_site(
        "[a](../configs/demo/stage1.yaml) [b](../configs/demo/stage1.yaml#x)", "tutorial.md", site
    )
    assert [file.src_uri for file in files] == ["tutorial.md", "files/configs/demo/stage1.yaml.txt"]
    copied = files.get_file_from_path("files/configs/demo/stage1.yaml.txt")
    assert copied.content_string == (ROOT / "configs/demo/stage1.yaml").read_text()


def test_code_blocks_are_left_alone(site):
    code = "```\nsee [a](../README.md)\n```"
    assert on_site(f"{code}\n[a](../README.md)", "tutorial.md", site)[0] == f"{code}\n[a](overview.md)"


def test_a_diagram_that_was_not_drawn_is_a_warning(site, caplog):
    block = "```mermaid\nflowchart TD\n  a --> {}\n```"
    with caplog.at_level(logging.WARNING):
        text, _ = on_site(block.format("b"), "contributing.md", site)
    name = hooks.diagram_name("flowchart TD\n  a --> b\n")
    assert f"![Diagram]({name})" in text
    assert "mermaid" not in text
    assert [record.getMessage() for record in caplog.records] == [
        f"contributing.md: a diagram has no picture {name}: run python tools/docs/diagrams.py"
    ]
    assert hooks.diagram_name("flowchart TD\n  a --> c\n") != name


def test_a_notebook_is_its_text_and_code():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": [{"text": "1"}]},
    ]
    assert (
        hooks.notebook_markdown(json.dumps({"cells": cells})) == "# Title\ntext\n\n```python\nx = 1\nx\n```\n"
    )


def test_fields_of_a_docstring_are_a_list():
    text = "A thing.\n\nwidth, height: pixels of it,\n    upright\nkind: box or\n    outline\n\nNote: a sentence."
    assert docstrings.with_lists(text) == (
        "A thing.\n\n- `width, height`: pixels of it,\n    upright\n- `kind`: box or\n    outline\n\nNote: a sentence."
    )
