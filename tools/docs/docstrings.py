"""A griffe extension: lines `name: what it is` of our docstrings are lists on the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?P<names>[a-z_]\w*(, [a-z_]\w*)*): (?=\S)")


def with_lists(docstring: str) -> str:
    """Paragraphs that begin with `name: ` as Markdown lists with one item for each name; others as they are."""
    return "\n\n".join(
        as_list(paragraph) if FIELD.match(paragraph) else paragraph for paragraph in docstring.split("\n\n")
    )


def as_list(paragraph: str) -> str:
    items = []
    for line in paragraph.splitlines():
        field = FIELD.match(line)
        items.append(f"- `{field['names']}`: {line[field.end() :]}" if field else f"    {line.strip()}")
    return "\n".join(items)


class FieldLists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)
