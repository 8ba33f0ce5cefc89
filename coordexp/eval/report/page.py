"""What the HTML pages share: the template environment, escaping of model text, embedded pictures, writing the file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from coordexp.files import write_text

_COORD_TOKEN = re.compile(r"&lt;\|coord_\d{1,3}\|&gt;")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template to `path`, which appears complete or not at all."""
    html = _environment().get_template(template).render(**values)
    write_text(path, html)
    return path


def mark_coord_tokens(text: str) -> Markup:
    """HTML of model text, escaped, with every coordinate token in a `<span class="coord">`."""
    return Markup(_COORD_TOKEN.sub(r'<span class="coord">\g<0></span>', str(escape(text))))


def format_measure(value: float | None, decimals: int) -> str:
    """The number as shown in a table; a dash for None."""
    return "–" if value is None else f"{value:.{decimals}f}"


def data_uri(content: bytes, media_type: str) -> str:
    """The content as a URI that needs no fetching."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("coordexp.eval.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mark_coord_tokens"] = mark_coord_tokens
    return environment
