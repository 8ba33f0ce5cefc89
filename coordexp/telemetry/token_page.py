"""A page that shows a token sequence, each token coloured by the part of the sample it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).parent / "templates" / "token_page.html.jinja"

ROLE_COLORS = {
    "prompt": "#e4e7ea",
    "ground truth": "#cfe8d5",
    "prefix": "#d9d3e8",
    "matched prefix": "#c5dcf2",
    "fp prefix": "#f6cfc6",
    "dropped prefix": "#eab6ad",
    "fn tail": "#cfe8d5",
    "closure": "#f7e3a8",
    "eos": "#f2cd73",
}
"""Background of each role, by its name in lower-case words; dark text reads well on all of them."""
_OTHER_ROLE = "#ffffff"


@dataclass(frozen=True)
class PageToken:
    """One token as it is shown.

    role: a key of ROLE_COLORS (another name is shown uncoloured).  kind: "struct", "desc", "coord" or "eos".
    note: a number beside it.  tooltip: what is known about it, in one line.
    """

    text: str
    role: str
    kind: str = "struct"
    is_supervised: bool = True
    note: str = ""
    tooltip: str = ""

    @property
    def css(self) -> str:
        """Classes of its span."""
        return f"{css_name(self.role)} {self.kind}"


def css_name(role: str) -> str:
    """The class of a role."""
    return role.replace(" ", "-")


def render_token_page(
    title: str, facts: Sequence[str], tokens: Sequence[PageToken], slots: Sequence[dict[str, str]] = ()
) -> str:
    """One HTML file without links to anything else.

    facts: lines above the tokens.  slots: rows with tokens, role, written and taught, for supervised coordinates.
    """
    counts = Counter(token.role for token in tokens)
    roles = [
        {
            "css": css_name(role),
            "name": role,
            "color": ROLE_COLORS.get(role, _OTHER_ROLE),
            "count": counts[role],
        }
        for role in sorted(counts, key=_order)
    ]
    notes = any(token.note for token in tokens)
    return _template().render(title=title, facts=facts, roles=roles, tokens=tokens, slots=slots, notes=notes)


def _order(role: str) -> tuple[int, str]:
    known = list(ROLE_COLORS)
    return (known.index(role), "") if role in ROLE_COLORS else (len(known), role)


@cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
