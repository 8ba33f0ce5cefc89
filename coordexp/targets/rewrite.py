"""A rollout rewritten before it is taught: objects leave it, and missed ones are written where they belong.

What is left of the model's answer keeps its own token ids. Only where two pieces meet are the tokens on both sides of
the seam spelled anew, together with what stands between them, as they would be in an encoding of the whole text. The
result is parsed like any answer, so that everything behind it works as for an answer that the model wrote so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.parse import DroppedRecord, ParsedObject, ParsedRollout
from coordexp.codec.pieces import DecodedTokens, TokenPieces, pieces_of
from coordexp.codec.schema import KIND_BBOX, BoxObject
from coordexp.geometry import FloatArray, pairwise_iou, polygon_box
from coordexp.matching.hungarian import MatchResult
from coordexp.targets.prefix import TaughtPrefix
from coordexp.targets.roles import TokenRole
from coordexp.targets.sample import PrefixEdits


@dataclass(frozen=True)
class PrefixRules:
    """What leaves the prefix of a rollout, and where missed objects go: `rollout_matching.targets` as plain values."""

    duplicate_iou: float | None = None
    """A prediction without a partner that covers another one so far leaves; None: it stays."""
    replace_above_iou: float | None = None
    """A prediction without a partner that covers a missed object so far makes room for it; None: it stays."""
    drop_unmatched: bool = False
    """Every prediction without a partner leaves, and every dropped record."""
    missed_in_order: bool = False
    """Missed objects stand among the predictions in the order of the ground truth, not behind them."""

    @property
    def change_nothing(self) -> bool:
        return self == PrefixRules()


@dataclass(frozen=True)
class _Piece:
    """A record of the rollout that stays, or a missed object that is written."""

    record: int | None
    """Its index; None for what is written."""
    gt: int
    """The partner of the record, or the missed object; -1 for a record without one."""


def rewritten(
    parsed: ParsedRollout,
    match: MatchResult,
    gts: Sequence[BoxObject],
    rules: PrefixRules,
    tok: Tokenizer,
    form: AnswerForm,
) -> TaughtPrefix | None:
    """The prefix that the rules leave; None when the tokenizer cannot spell it.

    parsed: with a prefix of its own.  match: of `parsed.objects` with `gts`.
    """
    plan, edits = _plan(parsed, match, gts, rules)
    again = form.parse(_compose(parsed, plan, gts, pieces_of(tok), form), tok)
    if len(again.records) != len(plan):
        return None
    partners: dict[int, int] = {}
    written: dict[int, int] = {}
    roles: list[TokenRole] = []
    num_objects = 0
    for record, piece in zip(again.records, plan, strict=True):
        is_object = isinstance(record, ParsedObject)
        if piece.gt >= 0:
            if not is_object:
                return None
            (written if piece.record is None else partners)[num_objects] = piece.gt
        roles.append(_role(parsed, piece))
        num_objects += is_object
    if not all(_is_same(again.objects[index], gts[gt], form) for index, gt in written.items()):
        return None
    return TaughtPrefix(again, roles, partners, written, edits, parsed.dropped_invalid > 0)


def _is_same(found: BoxObject, wanted: BoxObject, form: AnswerForm) -> bool:
    """Numbers may stand for a bin beside the wanted one."""
    equal_bins = found.bins == wanted.bins or not form.has_coord_tokens
    return (found.desc, found.kind) == (wanted.desc, wanted.kind) and equal_bins


def _role(parsed: ParsedRollout, piece: _Piece) -> TokenRole:
    if piece.record is None:
        return TokenRole.FN_TAIL
    if piece.gt >= 0:
        return TokenRole.MATCHED_PREFIX
    dropped = isinstance(parsed.records[piece.record], DroppedRecord)
    return TokenRole.DROPPED_PREFIX if dropped else TokenRole.FP_PREFIX


# --- what stays, and where missed objects go ---


def _plan(
    parsed: ParsedRollout, match: MatchResult, gts: Sequence[BoxObject], rules: PrefixRules
) -> tuple[list[_Piece], PrefixEdits]:
    boxes_P4, boxes_G4 = _boxes(parsed.objects), _boxes(gts)
    partner_of = dict(match.matched)
    duplicates = _duplicates(boxes_P4, partner_of, rules.duplicate_iou)
    others = [pred for pred in match.unmatched_pred if pred not in duplicates]
    replaced = _replaced(
        others, match.unmatched_gt, pairwise_iou(boxes_P4, boxes_G4), rules.replace_above_iou
    )
    pieces: list[_Piece] = []
    pred = num_unmatched = 0
    for index, record in enumerate(parsed.records):
        if isinstance(record, DroppedRecord):
            pieces += [] if rules.drop_unmatched else [_Piece(index, -1)]
            continue
        if pred in replaced:
            pieces.append(_Piece(None, replaced[pred]))
        elif pred in partner_of:
            pieces.append(_Piece(index, partner_of[pred]))
        elif pred not in duplicates and rules.drop_unmatched:
            num_unmatched += 1
        elif pred not in duplicates:
            pieces.append(_Piece(index, -1))
        pred += 1
    if rules.missed_in_order:
        for gt in sorted(set(match.unmatched_gt) - set(replaced.values())):
            _insert(pieces, gt)
    num_written = sum(piece.record is None for piece in pieces)
    return pieces, PrefixEdits(len(duplicates), len(replaced), num_unmatched, num_written)


def _boxes(objects: Sequence[BoxObject]) -> FloatArray:
    """Left, top, right and bottom of each, float [N, 4]."""
    boxes = [obj.bins if obj.kind == KIND_BBOX else polygon_box(obj.bins) for obj in objects]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _duplicates(boxes_P4: FloatArray, partner_of: dict[int, int], least: float | None) -> set[int]:
    """Predictions without a partner that cover one with a partner, or an earlier one that stays."""
    found: set[int] = set()
    if least is None:
        return found
    iou_PP = pairwise_iou(boxes_P4, boxes_P4)
    for pred in range(len(boxes_P4)):
        if pred in partner_of:
            continue
        others = [o for o in range(len(boxes_P4)) if o in partner_of or (o < pred and o not in found)]
        if any(iou_PP[pred, other] >= least for other in others):
            found.add(pred)
    return found


def _replaced(
    preds: Sequence[int], missed: Sequence[int], iou_PG: FloatArray, least: float | None
) -> dict[int, int]:
    """Which prediction makes room for which missed object: the pairs that cover each other most, each once."""
    if least is None:
        return {}
    pairs = sorted((-iou_PG[p, g], p, g) for p in preds for g in missed if iou_PG[p, g] >= least)
    found: dict[int, int] = {}
    for _, pred, gt in pairs:
        if pred not in found and gt not in found.values():
            found[pred] = gt
    return found


def _insert(pieces: list[_Piece], gt: int) -> None:
    """Before the first piece of a later ground truth; behind all of those it is left for the end of the target."""
    at = next((i for i, piece in enumerate(pieces) if piece.gt > gt), None)
    if at is not None:
        pieces.insert(at, _Piece(None, gt))


# --- tokens ---


def _records(objects: Sequence[BoxObject], form: AnswerForm) -> str:
    """Records as they stand in an answer."""
    return form.serialize(objects).removeprefix(form.opening).removesuffix(form.closing)


def _compose(
    parsed: ParsedRollout,
    plan: Sequence[_Piece],
    gts: Sequence[BoxObject],
    pieces: TokenPieces,
    form: AnswerForm,
) -> list[int]:
    """Token ids of the container's opening and the pieces of the plan."""
    tokens = DecodedTokens.from_ids(parsed.response_token_ids, pieces)
    runs, seams = [(0, parsed.body)], [b""]
    between = form.separator.encode()
    last: int | None = -1  # the record that the last run ends with, None behind a written object
    for place, piece in enumerate(plan):
        separator = between if place else b""
        if piece.record is None:
            seams[-1] += separator + _records([gts[piece.gt]], form).encode()
        elif last == piece.record - 1:
            runs[-1] = (runs[-1][0], parsed.records[piece.record].byte_span[1])
        else:
            before = plan[place - 1].record if place else None
            seams[-1] += _lead(parsed, before, piece.record, separator, form)
            runs.append(parsed.records[piece.record].byte_span)
            seams.append(b"")
        last = piece.record
    return _joined(tokens, runs, seams, pieces)


def _lead(parsed: ParsedRollout, before: int | None, index: int, separator: bytes, form: AnswerForm) -> bytes:
    """What stands before a record that follows another one than in the answer.

    before: the record that it follows, None where that is none of the answer. A box under the name of another one
    (compact form) stays under that name, or gets it before itself.
    """
    record = parsed.records[index]
    if not isinstance(record, ParsedObject) or record.has_own_desc:
        return separator
    other = None if before is None else parsed.records[before]
    if isinstance(other, ParsedObject) and other.desc_span == record.desc_span:
        return b""
    return separator + form.written_desc(record.desc).encode()


def _joined(
    tokens: DecodedTokens, runs: Sequence[tuple[int, int]], seams: Sequence[bytes], pieces: TokenPieces
) -> list[int]:
    """The ids of runs of bytes of the answer, each followed by its seam.

    A seam is spelled together with what a run holds of a token that reaches over its end, and where the run ends with
    a token, with that token. At the very end such a token stays whole: the target spells it anew, and knows by it that
    the model wrote another one there.
    """
    ids: list[int] = []
    waiting = b""
    for index, ((start, stop), seam) in enumerate(zip(runs, seams, strict=True)):
        first, after = tokens.tokens_over(start, stop)
        first += tokens.start_of(first) < start
        ends_here = index == len(runs) - 1 and not seam
        after -= after > first and tokens.ends[after - 1] > stop and not ends_here
        own = tokens.ids[first:after]
        head = tokens.data[start : tokens.start_of(first) if own else stop]
        tail = tokens.data[tokens.ends[after - 1] : stop] if own else b""
        if index and own and not head:
            head, own = pieces[own[0]], own[1:]
        waiting += head
        if own:
            ids += [*_spelled(waiting, pieces), *own]
            waiting = b""
            if not tail and not ends_here:
                tail = pieces[ids.pop()]
        waiting += tail + seam
    return ids + _spelled(waiting, pieces)


def _spelled(data: bytes, pieces: TokenPieces) -> list[int]:
    return pieces.encode_exactly(data) if data else []
