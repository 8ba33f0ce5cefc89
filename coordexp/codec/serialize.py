"""Objects -> CoordJSON, the text a model is taught to write, and CoordJSON -> strict JSON.

{"objects": [{"desc": "cat", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}]}
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from itertools import takewhile

from coordexp.codec.coord_vocab import coord_token
from coordexp.codec.layout import COORDJSON, JsonLayout
from coordexp.codec.scanner import find_container, find_object_end, find_value_end, skip_space
from coordexp.codec.schema import IM_END, BoxObject, bins_fault, check_field_order
from coordexp.errors import ConfigError, RecordError, RolloutError

_STRING_OR_COORD = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|<\|coord_(0|[1-9][0-9]{0,2})\|>', re.DOTALL)
_ESCAPE_AND_MORE = re.compile(r"(\\(?:u[0-9a-f]{4}|.))([^\x00-\x7f]*+)")


def serialize(
    objects: Iterable[BoxObject], field_order: str = "desc_first", *, layout: JsonLayout = COORDJSON
) -> str:
    """CoordJSON (or the answer in another layout) of `objects` in the given order, without the final `<|im_end|>`.

    Raises ConfigError for an unknown field order, RecordError for an object that cannot be written.
    """
    return layout.opening + _join_records(objects, field_order, layout) + layout.closing


def append_fragment(
    objects: Iterable[BoxObject],
    prefix_text: str,
    field_order: str = "desc_first",
    *,
    layout: JsonLayout = COORDJSON,
) -> str:
    """The text that completes an open container with `objects`: `prefix_text + fragment` is CoordJSON.

    `prefix_text` must be append-ready: an open container that ends in its `[` or in the `}` of its last
    record. Raises RolloutError otherwise.
    """
    has_records = _prefix_has_records(prefix_text, layout)
    records = _join_records(objects, field_order, layout)
    separator = ", " if has_records and records else ""
    return separator + records + layout.closing


def to_strict_json(text: str, coords: str = "ints") -> str:
    """CoordJSON as strict JSON: bare coordinate tokens become ints (`"ints"`) or quoted tokens (`"strings"`).

    Text inside strings is left alone, and a final `<|im_end|>` is removed. Nothing is checked or repaired.
    """
    if coords not in ("ints", "strings"):
        raise ConfigError(f"coords is {coords!r}, expected one of ints, strings")

    def replace(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return match[1] if coords == "ints" else f'"{match[0]}"'

    return _STRING_OR_COORD.sub(replace, text.removesuffix(IM_END))


def _join_records(objects: Iterable[BoxObject], field_order: str, layout: JsonLayout) -> str:
    check_field_order(field_order)
    return ", ".join(_record(index, obj, field_order, layout) for index, obj in enumerate(objects))


def _record(index: int, obj: BoxObject, field_order: str, layout: JsonLayout) -> str:
    check_writable(index, obj)
    desc = f'"{layout.desc_key}": {quoted(obj.desc)}'
    scale = layout.scale
    written = [coord_token(k) if scale is None else str(scale.number_of(k)) for k in obj.bins]
    geometry = f'"{obj.kind}": [{", ".join(written)}]'
    first, second = (desc, geometry) if field_order == "desc_first" else (geometry, desc)
    return f"{{{first}, {second}}}"


def quoted(desc: str) -> str:
    """A description as the JSON string that stands in a record: non-ASCII kept, in NFC when `desc` is.

    `<|` is written `\\u003c|`, so that a description such as `<|im_end|>` or `<|image_pad|>` stays text and
    never becomes a control token. Marks that would combine with the letter of an escape before them (`\\n`
    and U+0301 make `\\ń` in a tokenizer that normalizes) are escaped themselves.
    """
    return keep_normal(json.dumps(desc, ensure_ascii=False).replace("<|", "\\u003c|"))


def keep_normal(text: str) -> str:
    """`text` with JSON's escapes, in which marks that would combine with the escape before them are escaped too."""
    return text if unicodedata.is_normalized("NFC", text) else _ESCAPE_AND_MORE.sub(_escape_marks, text)


def _escape_marks(match: re.Match[str]) -> str:
    """The escape of `match`, the combining marks right after it as escapes, and the rest."""
    escape, more = match.groups()
    marks = "".join(takewhile(unicodedata.combining, more))
    return escape + json.dumps(marks)[1:-1] + more[len(marks) :]


def check_writable(index: int, obj: BoxObject) -> None:
    """RecordError naming the object unless any form can write it."""
    if not isinstance(obj.desc, str) or not obj.desc.strip():
        raise RecordError(f"object {index} (0-based) has desc {obj.desc!r}, expected a non-empty string")
    try:
        obj.desc.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"object {index} (0-based) has a desc that is no Unicode text ({obj.desc!r}): {error.reason} "
            f"at character {error.start}. Remove the lone surrogate"
        ) from error
    fault = bins_fault(obj.kind, obj.bins)
    if fault:
        raise RecordError(f"object {index} (0-based, desc {obj.desc!r}): {fault}")


def _prefix_has_records(prefix_text: str, layout: JsonLayout) -> bool:
    """Whether an append-ready prefix holds a record; RolloutError when it is not append-ready."""
    data = prefix_text.encode("utf-8", errors="replace")
    container = find_container(data, is_array=layout.is_array)
    if container is None:
        raise not_append_ready(prefix_text, "it has no open container", layout.opening)
    if container.body == len(data):
        return False
    if not data.endswith(b"}"):
        raise not_append_ready(
            prefix_text, "it ends in neither the container's `[` nor a `}`", layout.opening
        )
    pos = container.body
    while pos < len(data):
        pos = skip_space(data, pos)
        lead = data[pos : pos + 1]
        if lead == b"]":
            raise not_append_ready(prefix_text, "its container is already closed", layout.opening)
        if lead in (b",", b"}"):
            pos += 1
            continue
        end = find_object_end(data, pos) if lead == b"{" else find_value_end(data, pos)
        if end is None:
            raise not_append_ready(prefix_text, "it ends inside a record", layout.opening)
        pos = end
    return True


def not_append_ready(prefix_text: str, why: str, opening: str) -> RolloutError:
    """The error about a prefix that nothing can be appended to. opening: of answers in its form."""
    return RolloutError(
        f"prefix is not append-ready: {why}. Expected {opening!r} with zero or more complete records "
        f"and nothing after the last one; found ...{prefix_text[-60:]!r}"
    )
