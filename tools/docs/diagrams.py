"""Draw the mermaid diagrams of runbooks/*.md as pictures for the site: runbooks/images/diagrams/*.svg.

    npm pack mermaid && tar xzf mermaid-*.tgz package/dist/mermaid.min.js
    python tools/docs/diagrams.py package/dist/mermaid.min.js

Needed after a diagram has changed: the site's build, which reaches no network, names those without a picture.
Uses Chromium. Pictures of diagrams that are gone are removed.
"""

from __future__ import annotations

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from hooks import MERMAID, ROOT, diagram_name

PAGE = """<!doctype html><meta charset="utf-8"><script src="{script}"></script><body>{blocks}<script>
mermaid.initialize({{
  startOnLoad: false, deterministicIds: true, theme: "neutral", htmlLabels: false,
  flowchart: {{htmlLabels: false, wrappingWidth: 400}},
}});
mermaid.run();
</script>"""


def main(script: Path) -> int:
    from coordexp.files import write_text

    sources = {
        diagram_name(block[1]): block[1]
        for page in sorted((ROOT / "runbooks").rglob("*.md"))
        for block in MERMAID.finditer(page.read_text(encoding="utf-8"))
    }
    blocks = "".join(f'<pre class="mermaid">{html.escape(text)}</pre>' for text in sources.values())
    pictures = re.findall(
        r"<svg.*?</svg>", drawn(PAGE.format(script=script.resolve().as_uri(), blocks=blocks)), re.DOTALL
    )
    if len(pictures) != len(sources):
        print(f"{len(pictures)} of {len(sources)} diagrams were drawn", file=sys.stderr)
        return 1
    folder = ROOT / "runbooks/images/diagrams"
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(folder.glob("*.svg")) - {ROOT / "runbooks" / name for name in sources}:
        old.unlink()
    for name, picture in zip(sources, pictures, strict=True):
        write_text(ROOT / "runbooks" / name, sized(picture))
        print(f"runbooks/{name}")
    return 0


def drawn(page: str) -> str:
    """The page as Chromium builds it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        done = subprocess.run(
            [
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                f"--user-data-dir={folder}/profile", "--virtual-time-budget=20000", "--window-size=1100,2000",
                "--dump-dom", file.as_uri(),
            ],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    return done.stdout


def sized(svg: str) -> str:
    """A picture with a size of its own (mermaid gives one in terms of the page) that XML readers take."""
    box = re.search(r'viewBox="([-\d.]+) ([-\d.]+) ([\d.]+) ([\d.]+)"', svg)
    assert box is not None, svg[:200]
    start, rest = svg.split(">", 1)
    start = re.sub(r' (width|height|style)="[^"]*"', "", start)
    return f'{start} width="{float(box[3]):.0f}" height="{float(box[4]):.0f}">{rest}\n'.replace(
        "<br>", "<br/>"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1])))
