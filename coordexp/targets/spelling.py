"""Text -> token ids that decode to exactly that text, alone or behind the tokens of a rollout.

A byte-pair encoding joins characters across the end of a record: Qwen's tokens for `]}, {` are `]},` and ` {`, for
`]}]}` they are `]}` and `]}`. A model that learned from whole targets therefore decides at the last token of a record
whether it goes on. Text appended to a rollout is spelled the same way: together with the last token of what is kept.
"""

from __future__ import annotations

from typing import NamedTuple

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.pieces import DecodedTokens, pieces_of


class Tail(NamedTuple):
    """How a target goes on after a rollout.

    num_kept: leading tokens of the prefix that stay as the model wrote them.
    tokens: the rest of the prefix with the appended text.
    """

    num_kept: int
    tokens: DecodedTokens


def spell(text: str, tok: Tokenizer) -> DecodedTokens | None:
    """Encode `text` on its own; None unless the tokens decode to exactly `text`.

    Tokenizers of the Qwen family bring text to Unicode's NFC form before they encode it. Records are serialized
    in that form, so it changes nothing.
    """
    tokens = DecodedTokens.from_ids(tok.encode(text, add_special_tokens=False), pieces_of(tok))
    return tokens if tokens.data == text.encode() else None


def spell_tail(parsed: ParsedRollout, fragment: str, tok: Tokenizer) -> Tail | None:
    """Encode `fragment` behind the prefix of `parsed`, as it would be in an encoding of the whole text.

    The last token of the prefix is encoded anew together with `fragment`; when it comes out as the model wrote it,
    it is kept. Where the two cannot be encoded together without a change to what the model wrote (a token that begins
    inside a character), `fragment` stands alone. None when the tokenizer does not keep `fragment`.
    """
    pieces, prefix = pieces_of(tok), parsed.prefix_token_ids
    num_verbatim = parsed.num_verbatim_prefix_tokens
    num_kept = min(num_verbatim, len(prefix) - 1)
    last = pieces.join(prefix[num_kept:])
    tokens = _spell_behind(last, fragment, tok)
    if tokens is None:
        alone = spell(fragment, tok)
        if alone is None:
            return None
        tokens = DecodedTokens.from_ids([*prefix[num_kept:], *alone.ids], pieces)
    if num_kept < num_verbatim and tokens.ids[0] == prefix[num_kept]:
        return Tail(num_kept + 1, DecodedTokens.from_ids(tokens.ids[1:], pieces))
    return Tail(num_kept, tokens)


def _spell_behind(last: bytes, fragment: str, tok: Tokenizer) -> DecodedTokens | None:
    """`last` and `fragment` encoded as one text; None when that is impossible or would change `last`."""
    try:
        text = last.decode()
    except UnicodeDecodeError:
        return None
    tokens = spell(text + fragment, tok)
    return tokens if tokens is not None and tokens.data.startswith(last) else None
