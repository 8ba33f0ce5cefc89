"""Token ids -> bytes with exact token boundaries, for byte-level BPE tokenizers.

One token may hold a part of a character only, so text is put together from bytes: the bytes of a token list
are the bytes of its tokens, joined, and decoding them (undecodable bytes become U+FFFD) gives what the
tokenizer's own decode gives.
"""

from __future__ import annotations

import codecs
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from coordexp.codec.coord_vocab import CoordVocab, Tokenizer
from coordexp.codec.schema import CONTAINER_OPEN, IM_END
from coordexp.errors import ConfigError, RolloutError

_MAX_TOKEN_ID = 2**32 - 1


def _byte_by_symbol() -> dict[str, int]:
    """The byte-level BPE alphabet: printable Latin-1 characters stand for themselves, the other bytes for
    the characters from U+0100 on (Radford et al. 2019, `bytes_to_unicode` of the GPT-2 code)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_BY_SYMBOL = _byte_by_symbol()
_SYMBOL_BY_BYTE = {byte: symbol for symbol, byte in _BYTE_BY_SYMBOL.items()}


def token_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for; an added token outside the byte alphabet is its own text."""
    try:
        return bytes([_BYTE_BY_SYMBOL[symbol] for symbol in token])
    except KeyError:
        return token.encode("utf-8", errors="replace")


def token_symbols(data: bytes) -> str:
    """The vocabulary entry that stands for `data`: the inverse of `token_bytes`."""
    return "".join(_SYMBOL_BY_BYTE[byte] for byte in data)


def token_names(tok: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Vocabulary entries by id; `<id 151999>` for one beyond the tokenizer's, as padded heads can write it."""
    ids = list(map(int, ids))
    found = tok.convert_ids_to_tokens(ids)
    return [f"<id {i}>" if name is None else str(name) for i, name in zip(ids, found, strict=True)]


class TokenPieces(dict[int, bytes]):
    """Bytes of each token id, looked up on first use. An id the tokenizer does not know has no bytes.

    Built once per tokenizer by `pieces_of`. The tokenizer is referenced weakly.

    im_end_id: the id of `<|im_end|>`, None when it is no single token.
    """

    def __init__(self, tok: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = weakref.ref(tok)
        im_end_ids = tok.encode(IM_END, add_special_tokens=False)
        self.im_end_id = im_end_ids[0] if len(im_end_ids) == 1 else None
        self._openings: dict[str, tuple[int, ...]] = {}
        self.opening_ids(CONTAINER_OPEN)

    @cached_property
    def coord_vocab(self) -> CoordVocab:
        """Its coordinate tokens; ConfigError when it lacks them."""
        return CoordVocab.from_tokenizer(self._live_tokenizer())

    def opening_ids(self, opening: str) -> tuple[int, ...]:
        """The ids of what an answer opens with. ConfigError when the tokenizer does not keep that text."""
        if opening not in self._openings:
            ids = tuple(self._live_tokenizer().encode(opening, add_special_tokens=False))
            if self.join(ids) != opening.encode():
                raise ConfigError(
                    f"{type(self._live_tokenizer()).__name__} does not keep the text {opening!r} (it decodes to "
                    f"{self.join(ids)!r}): expected a byte-level BPE tokenizer, as Qwen has"
                )
            self._openings[opening] = ids
        return self._openings[opening]

    def _live_tokenizer(self) -> Tokenizer:
        tok = self._tokenizer()
        if tok is None:
            raise ReferenceError("the tokenizer of these pieces is gone")
        return tok

    def __missing__(self, token_id: int) -> bytes:
        tok = self._live_tokenizer()
        if not 0 <= token_id <= _MAX_TOKEN_ID:
            return b""
        token = tok.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        piece = self[token_id] = token_bytes(token)
        return piece

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a token list."""
        return b"".join(map(self.__getitem__, ids))

    def texts(self, ids: Iterable[int]) -> list[str]:
        """What each token adds to the text: joined, they are the full decode.

        A character that several tokens make together stands with the last of them; the others add nothing.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = [decoder.decode(self[token_id]) for token_id in ids]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts

    def before_im_end(self, token_ids: Iterable[int]) -> list[int]:
        """The ids before the first `<|im_end|>` token, all of them when there is none."""
        ids = list(map(int, token_ids))
        if self.im_end_id is None:
            return ids
        try:
            return ids[: ids.index(self.im_end_id)]
        except ValueError:
            return ids

    def encode_exactly(self, data: bytes) -> list[int]:
        """Token ids whose bytes are exactly `data`: the tokenizer's own encoding, or one token per byte
        where that would change the bytes. RolloutError when the vocabulary has no such tokens."""
        tok = self._live_tokenizer()
        ids = tok.encode(data.decode("utf-8", errors="replace"), add_special_tokens=False)
        if self.join(ids) == data:
            return ids
        ids = [tok.convert_tokens_to_ids(_SYMBOL_BY_BYTE[byte]) for byte in data]
        if None in ids or self.join(ids) != data:
            raise RolloutError(
                f"the tokenizer has no tokens for the bytes {data!r}: expected a byte-level BPE"
            )
        return ids


_PIECES: weakref.WeakKeyDictionary[Tokenizer, TokenPieces] = weakref.WeakKeyDictionary()


def pieces_of(tok: Tokenizer) -> TokenPieces:
    """The pieces of a tokenizer, made on first use and kept as long as the tokenizer lives.

    Raises ConfigError when the tokenizer is no byte-level BPE.
    """
    pieces = _PIECES.get(tok)
    if pieces is None:
        pieces = _PIECES[tok] = TokenPieces(tok)
    return pieces


@dataclass(frozen=True, slots=True)
class DecodedTokens:
    """Token ids with their joined bytes; `ends[i]` is the byte offset just after token i."""

    ids: list[int]
    data: bytes
    ends: array[int]

    @classmethod
    def from_ids(cls, ids: list[int], pieces: TokenPieces) -> DecodedTokens:
        parts = list(map(pieces.__getitem__, ids))
        return cls(ids, b"".join(parts), array("I", accumulate(map(len, parts))))

    @property
    def text(self) -> str:
        """The text a full decode of the ids gives."""
        return self.data.decode("utf-8", errors="replace")

    def start_of(self, position: int) -> int:
        """Byte offset of the first byte of a token."""
        return self.ends[position - 1] if position else 0

    def tokens_over(self, start: int, stop: int) -> tuple[int, int]:
        """Half-open range of the tokens that overlap the bytes `start:stop` (empty for an empty range)."""
        if start >= stop:
            first = bisect_right(self.ends, start)
            return first, first
        return bisect_right(self.ends, start), bisect_left(self.ends, stop) + 1

    def cut(self, offset: int, pieces: TokenPieces) -> DecodedTokens:
        """The tokens of the bytes before `offset`. Only a token that the cut splits is encoded anew."""
        if offset <= 0:
            return DecodedTokens([], b"", array("I"))
        last = bisect_left(self.ends, offset)
        if self.ends[last] == offset:
            return DecodedTokens(self.ids[: last + 1], self.data[:offset], self.ends[: last + 1])
        remainder_start = self.start_of(last)
        remainder = pieces.encode_exactly(self.data[remainder_start:offset])
        remainder_ends = accumulate((len(pieces[i]) for i in remainder), initial=remainder_start)
        ends = self.ends[:last] + array("I", list(remainder_ends)[1:])
        return DecodedTokens(self.ids[:last] + remainder, self.data[:offset], ends)
