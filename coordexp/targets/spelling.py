"""Text -> token ids that decode to exactly that text."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.pieces import DecodedTokens, pieces_of


class Spelling(NamedTuple):
    """A text and its tokens: `tokens.data` is `text` in UTF-8, byte for byte."""

    text: str
    tokens: DecodedTokens


def spell(text: str, tok: Tokenizer) -> Spelling | None:
    """Encode `text` on its own, and make sure that the tokens keep it.

    Tokenizers of the Qwen family bring text to Unicode's NFC form before they encode it. Where that changes
    `text` (accents written as characters of their own), the NFC form is what the model can be taught: it is
    then the returned text. None when the tokens spell anything else.
    """
    tokens = DecodedTokens.from_ids(tok.encode(text, add_special_tokens=False), pieces_of(tok))
    for form in (text, unicodedata.normalize("NFC", text)):
        if tokens.data == form.encode():
            return Spelling(form, tokens)
    return None
