"""Answers in JSON, with coordinate tokens or with numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from coordexp.codec.coord_vocab import Tokenizer, coord_token_bin
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.layout import JsonLayout
from coordexp.codec.parse import ParsedRollout, parse_rollout
from coordexp.codec.schema import BoxObject, check_field_order
from coordexp.codec.serialize import append_fragment, quoted, serialize, to_strict_json
from coordexp.codec.token_types import desc_token_positions, token_types


class JsonForm(AnswerForm):
    """A layout with the order of a record's two keys."""

    def __init__(self, name: str, layout: JsonLayout, field_order: str) -> None:
        check_field_order(field_order)
        self.name, self.layout, self.field_order = name, layout, field_order
        self.opening, self.closing, self.separator = layout.opening, layout.closing, ", "
        self.most_bytes_per_object = len(f'{{"{layout.desc_key}": "", "bbox_2d": []}}, ')
        digits = 1 if layout.scale is None else len(str(layout.scale.most))
        self.most_tokens_per_coord = digits + len(", ")

    @property
    def has_coord_tokens(self) -> bool:
        return self.layout.scale is None

    def serialize(self, objects: Iterable[BoxObject]) -> str:
        return serialize(objects, self.field_order, layout=self.layout)

    def written_desc(self, desc: str) -> str:
        return quoted(desc)[1:-1]

    def append_fragment(self, objects: Iterable[BoxObject], prefix_text: str) -> str:
        return append_fragment(objects, prefix_text, self.field_order, layout=self.layout)

    def parse(self, token_ids: Iterable[int], tok: Tokenizer, *, allow_poly: bool = True) -> ParsedRollout:
        return parse_rollout(
            token_ids, tok, field_order=self.field_order, allow_poly=allow_poly, layout=self.layout
        )

    def token_types(self, token_ids: Sequence[int], tok: Tokenizer) -> npt.NDArray[np.int8]:
        return token_types(token_ids, tok, layout=self.layout)

    def desc_token_positions(self, token_ids: Iterable[int], tok: Tokenizer) -> list[int]:
        return desc_token_positions(token_ids, tok, layout=self.layout)

    def strict_json(self, text: str) -> str | None:
        found = to_strict_json(text)
        try:
            json.loads(found)
        except json.JSONDecodeError:
            return None
        return found

    def bin_of_coord(self, text: str) -> int | None:
        scale = self.layout.scale
        return coord_token_bin(text) if scale is None else scale.bin_of_text(text)
