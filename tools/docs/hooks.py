"""What mkdocs does with our pages beyond Markdown: links to files of the repository, diagrams, the notebook.

Pages are written to be read in the repository too, so a link names a file there. On the site
- a link out of runbooks/ leads to a copy of that file (`files/...`), or to the page made of it (`PAGES`);
- a `mermaid` block becomes the picture that `python tools/docs/diagrams.py` drew of it, since mermaid itself would be
  fetched from a network;
- a notebook becomes a page of its text and code.
A link to a file that is not there, or a diagram that was not drawn, is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os.path
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "overview.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages of the site."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
FENCE = re.compile(r"^(```+|~~~+).*?^\1 *$", re.MULTILINE | re.DOTALL)
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.plugins.coordexp")


def diagram_name(source: str) -> str:
    """The picture of a mermaid block, by its text."""
    return f"images/diagrams/{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def notebook_markdown(notebook: str) -> str:
    """Text and code of a notebook (the JSON of an .ipynb) as Markdown; outputs are left out."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def with_links(text: str, replace: Callable[[str], str]) -> str:
    """Every link target outside of code blocks, as `replace` has it."""
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(lambda m: replace(m[1]), text[end : fence.start()]), fence[0]]
        end = fence.end()
    pieces.append(LINK.sub(lambda m: replace(m[1]), text[end:]))
    return "".join(pieces)


def site_path(name: str) -> str | None:
    """Where a file of the repository (a path from its top) stands on the site; None when there is no such file."""
    if name in PAGES:
        return PAGES[name]
    if not (ROOT / name).is_file():
        return None
    if name.startswith("runbooks/"):
        inside = name.removeprefix("runbooks/")
        return inside.removesuffix(".ipynb") + ".md" if inside.endswith(".ipynb") else inside
    return f"files/{name}.txt"  # as text, so that a browser shows it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            page = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, page, content=notebook_markdown(file.content_string)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == here), f"runbooks/{here}")

    def on_the_site(target: str) -> str:
        name = os.path.normpath(os.path.join(os.path.dirname(source), target))
        path = site_path(name)
        if path is None:
            return target  # mkdocs tells
        if path.startswith("files/") and files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=(ROOT / name).read_text(encoding="utf-8")))
        return os.path.relpath(path, os.path.dirname(here) or ".")

    def picture(block: re.Match[str]) -> str:
        name = diagram_name(block[1])
        if files.get_file_from_path(name) is None:
            log.warning("%s: a diagram has no picture %s: run python tools/docs/diagrams.py", here, name)
        at = os.path.relpath(name, os.path.dirname(here) or ".")
        return f'<div class="diagram" markdown tabindex="0">\n\n![Diagram]({at})\n\n</div>'

    return with_links(MERMAID.sub(picture, markdown), on_the_site)
