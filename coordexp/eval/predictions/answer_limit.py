"""How long an answer may become: derived from the ground truth that is to be found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.records import Record

LEAST_LIMIT = 1024
"""Tokens of about 40 boxes; no limit is below it."""
CANDIDATES = 32
"""The longest texts by their bytes are encoded; the most tokens are those of one of them."""

_ROOM = 1.5  # answers may be longer than the longest ground truth by half
_MULTIPLE = 64


def answer_limit(records: Sequence[Record], tok: Tokenizer, *, form: AnswerForm | None = None) -> int:
    """A `max_new_tokens` that every ground truth of `records` fits in, with room for half as many objects again.

    form: of the answers; None: CoordJSON.
    """
    form = form or form_of()
    texts = (form.serialize(record.objects) for record in records)
    longest = nlargest(CANDIDATES, texts, key=lambda text: len(text.encode()))
    return limit_for(max((len(tok.encode(text, add_special_tokens=False)) for text in longest), default=0))


def limit_for(num_tokens: int) -> int:
    """The limit where the longest ground truth has so many tokens."""
    return max(LEAST_LIMIT, math.ceil(_ROOM * num_tokens / _MULTIPLE) * _MULTIPLE)
