"""Guided decoding: of the next tokens only those are possible with which the answer stays one of its form.

A grammar (`coordexp.codec.forms.grammar`, matched by llguidance) decides on container, keys, strings and the number of
coordinates. Two things are added to it:

    order       the third and fourth coordinate of a box are not before its first and second
    closing     an answer that has to end writes no further object: from `reserve_of` tokens before its limit on, and
                from where its repetition would have ended it. So an answer that is guided always ends well.

Nothing is written that would not have been possible without: where the choice of an unguided step is allowed, it is the
choice of the guided one. With coordinates read from their distribution that means: first they are read as the model
means them; only where that bin is not allowed, they are read anew, from the distribution over the allowed ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.forms.grammar import grammar_of
from coordexp.codec.forms.json_form import JsonForm
from coordexp.codec.pieces import pieces_of
from coordexp.codec.schema import KIND_BBOX
from coordexp.config.schema.rollout import Readout, RepeatTerminate, RolloutMatching
from coordexp.errors import ConfigError, RolloutError
from coordexp.losses.columns import CoordColumns
from coordexp.rollout.decoding.readout import force_masked, force_readout
from coordexp.rollout.decoding.repetition import RepeatDetector

_BOX_OPENING = f'"{KIND_BBOX}": ['.encode()
_BETWEEN_COORDS = frozenset((b",", b" ", b", "))
_MORE = 16  # tokens that end a description in the middle of an escape, and close the answer
_LEAST_POINTS = 6  # coordinates of the smallest polygon
_WORD = 32

Bits = npt.NDArray[np.int32]
"""A bit for each token, [words]; token i is bit i % 32 of word i // 32."""


@dataclass(frozen=True)
class GuideRules:
    """What guided answers may be; of plain values, as they travel to an engine.

    form, field_order: of `coordexp.codec.forms.choose.form_of`.  allow_poly: polygons may be written.
    max_objects: the most that an answer may hold; None: any number.
    limit: tokens of an answer.  how: coordinates are read so.  repeats: when an answer has lost itself; None: never.
    """

    form: str
    field_order: str
    limit: int
    allow_poly: bool = True
    max_objects: int | None = None
    how: Readout = "argmax"
    repeats: dict[str, Any] | None = None

    @classmethod
    def of(cls, settings: RolloutMatching, form: AnswerForm, *, limit: int) -> GuideRules | None:
        """Those of the settings; None where they do not guide."""
        decoding, repeats = settings.decoding, settings.repeat_terminate
        if not decoding.guided:
            return None
        return cls(
            form.name,
            form.field_order if isinstance(form, JsonForm) else "desc_first",
            limit,
            max_objects=decoding.guided_max_objects or (repeats.max_object_keys if repeats.enabled else None),
            how=decoding.coord,
            repeats=repeats.model_dump() if repeats.enabled else None,
        )

    @property
    def close_at(self) -> int:
        """Tokens from which on an answer only comes to its end."""
        return self.limit - reserve_of(form_of(self.form, self.field_order))


def finish_reason(
    answer: Sequence[int], stop_ids: Collection[int], rules: GuideRules | None
) -> Literal["stop", "length"]:
    """Why an answer ended. rules: of a guided one, which may have met its limit and still end well; else None."""
    if not answer or answer[-1] not in stop_ids:
        return "length"
    return "length" if rules is not None and len(answer) > rules.close_at else "stop"


def reserve_of(form: AnswerForm) -> int:
    """How many tokens an answer of this form needs at most to end well, wherever it is."""
    coords = (_LEAST_POINTS if form.name != "compact" else 4) * form.most_tokens_per_coord
    return form.most_bytes_per_object + coords + _MORE


class Guide:
    """The grammar of one form on one tokenizer; `Guide.of` makes it once.

    columns: of the coordinate tokens.
    """

    def __init__(self, tok: Any, form: AnswerForm, *, allow_poly: bool, max_objects: int | None) -> None:
        self.pieces = pieces_of(tok)
        vocab = self.pieces.coord_vocab
        self.bin_by_id = vocab.bin_by_id
        self.columns = CoordColumns(vocab.ids)
        self.is_compact = form.name == "compact"
        self.end_id = self.pieces.im_end_id
        self.close_ids = {text: tok.convert_tokens_to_ids(text) for text in ('"', "}", "]")}
        self._ids = np.array(vocab.ids)
        self._bits = np.left_shift(np.uint32(1), (self._ids % _WORD).astype(np.uint32))
        tokenizer = _ll_tokenizer(tok, self.end_id)
        self.num_words = -(-tokenizer.vocab_size // _WORD)
        grammar = grammar_of(form, vocab.ids, allow_poly=allow_poly, max_objects=max_objects)
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise RolloutError(f"the grammar of {form.name} cannot be used: {self._matcher.get_error()}")

    @classmethod
    def of(cls, tok: Any, rules: GuideRules) -> Guide:
        """The guide of a tokenizer for these rules, kept as long as the tokenizer lives."""
        guides = _GUIDES.setdefault(tok, {})
        key = (rules.form, rules.field_order, rules.allow_poly, rules.max_objects)
        if key not in guides:
            form = form_of(rules.form, rules.field_order)
            guides[key] = cls(tok, form, allow_poly=rules.allow_poly, max_objects=rules.max_objects)
        return guides[key]

    def matcher(self) -> llguidance.LLMatcher:
        """One at the beginning of an answer."""
        return self._matcher.deep_copy()

    def coords_in(self, bits_W: Bits) -> bool:
        """Whether some coordinate is allowed."""
        return bool((bits_W.view(np.uint32)[self._ids // _WORD] & self._bits).any())

    def forbid_below(self, bits_W: Bits, first: int) -> None:
        """Forbid the bins below `first`."""
        words = bits_W.view(np.uint32)
        np.bitwise_and.at(words, self._ids[:first] // _WORD, ~self._bits[:first])

    def only_coords(self, bits_W: Bits) -> None:
        """Forbid what is no coordinate."""
        words, kept = bits_W.view(np.uint32), np.zeros_like(bits_W.view(np.uint32))
        np.bitwise_or.at(kept, self._ids // _WORD, self._bits)
        words &= kept


_TOKENIZERS: weakref.WeakKeyDictionary[Any, llguidance.LLTokenizer] = weakref.WeakKeyDictionary()
_GUIDES: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Guide]] = weakref.WeakKeyDictionary()


def _ll_tokenizer(tok: Any, end_id: int | None) -> llguidance.LLTokenizer:
    if tok not in _TOKENIZERS:
        try:
            _TOKENIZERS[tok] = llguidance.hf.from_tokenizer(tok, eos_token=end_id)
        except ValueError as error:
            raise ConfigError(
                f"guided decoding needs a fast tokenizer with <|im_end|>, found {type(tok).__name__}: {error}"
            ) from error
    return _TOKENIZERS[tok]


class GuidedRow:
    """Follows one answer token by token.

    num_tokens: of the answer so far.  at_coord: whether what `fill` allowed holds a coordinate.
    """

    def __init__(self, guide: Guide, rules: GuideRules) -> None:
        self.guide, self.how = guide, rules.how
        self.num_tokens = 0
        self.at_coord = False
        self._matcher = guide.matcher()
        self._close_at = rules.close_at
        self._max_objects = rules.max_objects if guide.is_compact else None
        self._ended = self._closing = False
        self._tail = b""
        self._bins: list[int] = []
        self._in_box = False
        self._num_objects = 0  # of the compact form
        self._repeats = (
            None
            if rules.repeats is None
            else RepeatDetector(RepeatTerminate(**rules.repeats), guide.pieces.__getitem__)
        )

    def extend(self, token_ids: Iterable[int]) -> None:
        """The next tokens of the answer; what follows its end is not looked at.

        Raises RolloutError for one that was not allowed.
        """
        for token_id in token_ids:
            if self._ended:
                return
            if not self._matcher.consume_token(token_id):
                raise RolloutError(
                    f"guided decoding: token {token_id} ({self.guide.pieces[token_id]!r}) was written where the "
                    f"grammar does not allow it ({self._matcher.get_error().splitlines()[0]}). Does another logits "
                    "processor force it?"
                )
            self._note(token_id)

    def fill(self, bits_BW: Bits, row: int) -> None:
        """Set row `row` of `bits_BW` to the tokens that may come next."""
        if self._ended:
            self.at_coord = False
            return
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits_BW, row)
        bits_W = bits_BW[row]
        if self._in_box and len(self._bins) in (2, 3):
            self.guide.forbid_below(bits_W, self._bins[len(self._bins) - 2])
        if self._closing or self.num_tokens >= self._close_at:
            self._close(bits_W)
        elif self._max_objects is not None and self._num_objects >= self._max_objects and self._bins:
            self._keep_first(bits_W, ("]",))
        self.at_coord = self.guide.coords_in(bits_W)

    def _note(self, token_id: int) -> None:
        self.num_tokens += 1
        if self._repeats is not None:
            self._repeats.extend((token_id,))
            self._closing = self._closing or self._repeats.triggered
        if token_id == self.guide.end_id:
            self._ended = True
            return
        bin_index, piece = self.guide.bin_by_id.get(token_id), self.guide.pieces[token_id]
        if bin_index is not None:
            if not self._bins:
                self._in_box = self.guide.is_compact or self._tail.endswith(_BOX_OPENING)
            self._bins.append(bin_index)
            if self.guide.is_compact and len(self._bins) > 4:
                self._bins = [bin_index]
            self._num_objects += self.guide.is_compact and len(self._bins) == 4
        elif self.guide.is_compact or piece not in _BETWEEN_COORDS:
            self._bins = []
        self._tail = (self._tail + piece)[-len(_BOX_OPENING) :]

    def _close(self, bits_W: Bits) -> None:
        """Leave what leads to the end: the end itself, else what closes a string, a record, an array."""
        if not self.guide.is_compact:
            self._keep_first(bits_W, ('"', "}", "]"))
        elif len(self._bins) == 4:
            self._keep_first(bits_W, ("]",))
        elif self.guide.coords_in(bits_W):
            self.guide.only_coords(bits_W)
        else:
            self._keep_first(bits_W, ("]", "}"))  # an empty answer, or a name of blanks

    def _keep_first(self, bits_W: Bits, texts: Sequence[str]) -> None:
        """Leave `<|im_end|>` or the first of these texts that is allowed; everything where none is."""
        words = bits_W.view(np.uint32)
        for token_id in (self.guide.end_id, *(self.guide.close_ids[text] for text in texts)):
            if token_id is not None and words[token_id // _WORD] >> np.uint32(token_id % _WORD) & 1:
                words[:] = 0
                words[token_id // _WORD] = np.uint32(1) << np.uint32(token_id % _WORD)
                return


def guide_scores(scores_BV: Tensor, rows: Sequence[GuidedRow]) -> Tensor:
    """Make every token impossible that does not go on with its row's answer, in place; read coordinates.

    scores_BV: as the model made them.
    """
    if not rows:
        return scores_BV
    guide = rows[0].guide
    bits_BW: Bits = np.full((len(rows), guide.num_words), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        row.fill(bits_BW, index)
    forbidden_BV = ~_unpacked(bits_BW, scores_BV.shape[1], scores_BV.device)
    read = {
        how: [i for i, row in enumerate(rows) if row.at_coord and row.how == how]
        for how in {row.how for row in rows} - {"argmax"}
    }
    raw = {how: scores_BV[at] for how, at in read.items() if at}
    scores_BV.masked_fill_(forbidden_BV, float("-inf"))
    for how, raw_RV in raw.items():
        at = read[how]
        meant_RV = force_readout(raw_RV, guide.columns, how)
        lost_R1 = forbidden_BV[at].gather(1, meant_RV.argmax(dim=1, keepdim=True))
        anew_RV = force_masked(scores_BV[at], guide.columns, how)
        meant_RV.masked_fill_(forbidden_BV[at], float("-inf"))
        scores_BV[at] = torch.where(lost_R1, anew_RV, meant_RV)
    return scores_BV


def _unpacked(bits_BW: Bits, num_tokens: int, device: torch.device) -> Tensor:
    """The bits as bool [B, num_tokens]; tokens beyond them are not allowed."""
    if device.type == "cpu":
        flat = np.unpackbits(bits_BW.view(np.uint8), axis=1, bitorder="little")
        allowed_BV = torch.from_numpy(flat).view(torch.bool)
    else:
        words = torch.from_numpy(bits_BW).to(device).unsqueeze(-1)
        shifts = torch.arange(_WORD, device=device, dtype=torch.int32)
        allowed_BV = ((words >> shifts) & 1).bool().flatten(1)
    missing = num_tokens - allowed_BV.shape[1]
    return torch.nn.functional.pad(allowed_BV, (0, missing)) if missing > 0 else allowed_BV[:, :num_tokens]


class GuidedAnswers(LogitsProcessor):
    """Guides the rows of transformers' `generate`; it must see the model's own scores.

    Arguments:
        prompt_length: columns of `input_ids` before the answers.
    """

    def __init__(self, guide: Guide, rules: GuideRules, *, num_rows: int, prompt_length: int) -> None:
        self._rows = [GuidedRow(guide, rules) for _ in range(num_rows)]
        self._seen = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, V]."""
        new_ids = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, ids in zip(self._rows, new_ids, strict=True):
            row.extend(ids)
        return guide_scores(scores, self._rows)
