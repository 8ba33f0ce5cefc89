"""What the HTML pages share: the template environment, escaping of model text, writing the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
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


def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(f"coordexp.eval.{name}", "templates") for name in ("report", "gallery")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mark_coord_tokens"] = mark_coord_tokens
    return environment
