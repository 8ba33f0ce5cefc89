"""Names of matched predictions: which of their tokens teach the name of the true object.

A name is taught on the model's own prefix, token by token, as far as the model wrote the true one. At the first token
that is not the true name's, the target is the true name's token; from there on the model stands behind a name that the
true one does not begin with, and no token of the true one is right any more. A name that is right is taught whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.parse import ParsedObject, ParsedRollout
from coordexp.codec.pieces import DecodedTokens, pieces_of


class TaughtNames(NamedTuple):
    """Tokens of a rollout whose predecessors predict a name.

    positions: into `response_token_ids`, ascending.  ids: what is taught there, the written token or the true one.
    """

    positions: list[int]
    ids: list[int]


def taught_names(
    parsed: ParsedRollout, true_descs: Mapping[int, str], tok: Tokenizer, num_kept: int, form: AnswerForm
) -> TaughtNames:
    """The taught tokens of the names of matched predictions, among the first `num_kept` tokens.

    true_descs: description of the partner of each matched prediction, by its index in `parsed.objects`.
    form: of the answer. Where a coordinate token stands right behind a name (compact form), that the name ends there,
        or does not, is not taught; a box under the name of another one has no name of its own.
    """
    pieces = pieces_of(tok)
    bins = pieces.coord_vocab.bin_by_id if form.has_coord_tokens else {}
    tokens = DecodedTokens.from_ids(parsed.response_token_ids, pieces)
    taught: list[tuple[int, int]] = []
    for index, record in enumerate(parsed.objects):
        if index in true_descs and record.has_own_desc:
            taught += _of_record(record, form.written_desc(true_descs[index]), tokens, tok)
    kept = [
        (at, token_id)
        for at, token_id in taught
        if at < num_kept and token_id not in bins and tokens.ids[at] not in bins
    ]
    return TaughtNames([at for at, _ in kept], [token_id for _, token_id in kept])


def _of_record(
    record: ParsedObject, true_desc: str, tokens: DecodedTokens, tok: Tokenizer
) -> list[tuple[int, int]]:
    """(position, taught id) of one record. true_desc: as it would be written in it.

    The record is encoded with the true name in place of its own, from the first token that it begins in, and the two
    are compared. Around its name a kept record is ASCII, so that its characters there are bytes.
    """
    (first, after), (start, stop) = record.token_span, record.byte_span
    name = (
        start + record.desc_span[0] - record.span[0],
        stop - (record.span[1] - record.desc_span[1]),
    )
    lead, rest = tokens.data[tokens.start_of(first) : name[0]], tokens.data[name[1] : stop]
    wanted = tok.encode(
        (lead + true_desc.encode() + rest).decode("utf-8", "replace"), add_special_tokens=False
    )
    taught: list[tuple[int, int]] = []
    for at, true_id in zip(range(first, after), wanted, strict=False):
        is_before, is_behind = tokens.ends[at] <= name[0], tokens.start_of(at) >= name[1]
        if tokens.ids[at] != true_id:
            # the token right behind the name says that the name ends there, and the true one goes on
            ends_name = tokens.start_of(at) == name[1]
            return taught if is_before or (is_behind and not ends_name) else [*taught, (at, true_id)]
        if is_behind:
            break
        if not is_before:
            taught.append((at, true_id))
    return taught
