"""What an answer may hold, as a grammar in llguidance's Lark: the answers of a form as `serialize` writes them.

Two things are no part of it, since a small grammar cannot say them: that the corners of a box stand in their order, and
in the compact form how many boxes there are. Descriptions hold no `<|`, which `serialize` escapes, and some character
that is no blank, as `parse` wants it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.compact import CompactForm
from coordexp.codec.forms.json_form import JsonForm
from coordexp.codec.schema import KIND_BBOX, KIND_POLY
from coordexp.errors import ConfigError

_HEX = "[0-9a-fA-F]"
_ESCAPE = (
    rf'\\(["\\\/bfnrt]|u([0-9a-ce-fA-CE-F]{_HEX}|[dD][0-7]){_HEX}{{2}}'
    rf"|u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})"
)
"""Of a JSON string; the two halves of a surrogate pair together."""
_BLANK = (
    r"[ \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]|\\[fnrt]"
    r"|\\u(00(0[9a-dA-D]|1[c-fC-F]|20|85|[aA]0)|1680|20(0[0-9aA]|2[89fF]|5[fF])|3000)"
)
"""A blank of `str.strip`, as it is or escaped."""
_TERMINALS = r"""
BLANKS: /({blank})*/
CONTROL: /(?s:.*)<\|(?s:.*)/
"""


def grammar_of(
    form: AnswerForm, coord_ids: Sequence[int], *, allow_poly: bool = True, max_objects: int | None = None
) -> str:
    """The grammar of whole answers in a form, without the final `<|im_end|>`.

    coord_ids: of the tokenizer.  allow_poly: polygons may be written where the form has them.
    max_objects: the most that an answer may hold; None: any number. The compact form does not look at it.

    Raises ConfigError for a form that writes numbers.
    """
    terminals = _TERMINALS.format(blank=_BLANK) + f"coord: <[{_ranges(coord_ids)}]>\n"
    if isinstance(form, CompactForm):
        return _compact_grammar(form) + terminals
    if not isinstance(form, JsonForm) or not form.has_coord_tokens:
        raise ConfigError(
            f"guided decoding writes coordinate tokens, and these answers ({form.name}) are of numbers; leave it off."
        )
    return _json_grammar(form, allow_poly, max_objects) + terminals


def _json_grammar(form: JsonForm, allow_poly: bool, max_objects: int | None) -> str:
    comma, opening, closing, quote = map(_text, (", ", "{", "}", '"'))
    more = f"({comma} record)" + ("*" if max_objects is None else f"{{0,{max_objects - 1}}}")
    more = "" if max_objects == 1 else more
    key = _text(f'"{form.layout.desc_key}": "')
    members = (f"{key} DESC {quote}", "geometry")
    first, second = members if form.field_order == "desc_first" else members[::-1]
    pair = f"{comma} coord {comma} coord"
    box = _array(KIND_BBOX, f"{comma} coord {pair}")
    poly = _array(KIND_POLY, f"{comma} coord {pair} {pair} ({pair})*")
    return rf"""
start: {_text(form.opening)} (record {more})? {_text(form.closing)}
record: {opening} {first} {comma} {second} {closing}
geometry: {f"{box} | {poly}" if allow_poly else box}
DESC: BODY & ~BLANKS & ~CONTROL
BODY: /([^"\\\x00-\x1f]|{_ESCAPE})*/
"""


def _array(kind: str, more: str) -> str:
    """A geometry. more: what follows its first coordinate."""
    opening = _text(f'"{kind}": [')
    return f"{opening} coord {more} {_text(']')}"


def _compact_grammar(form: CompactForm) -> str:
    return rf"""
start: {_text(form.opening)} (run ({_text(form.separator)} run)*)? {_text(form.closing)}
run: NAME box+
box: coord coord coord coord
NAME: BODY & ~BLANKS & ~CONTROL & ~/\](?s:.*)/
BODY: /([^\\\x00-\x1f]|{_ESCAPE})*/
"""


def _text(text: str) -> str:
    """A string of the grammar."""
    return json.dumps(text)


def _ranges(ids: Iterable[int]) -> str:
    """`3-7,9`: ids as runs of consecutive ones."""
    runs = (
        [value for _, value in run]
        for _, run in groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0])
    )
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
