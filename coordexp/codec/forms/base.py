"""What training, rollouts, inference and scoring ask of the form of an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.schema import BoxObject


class AnswerForm(ABC):
    """One way to write the objects of a picture as text, and to read them back.

    opening: what an answer begins with, up to its first record.  closing: what stands behind its last record.
    separator: between two records, each with a description of its own.
    most_bytes_per_object, most_tokens_per_coord: bounds of what `serialize` writes beside descriptions, where every
        byte is a token at most; the opening and the closing are not counted.
    """

    name: str
    opening: str
    closing: str
    separator: str
    most_bytes_per_object: int
    most_tokens_per_coord: int

    @property
    @abstractmethod
    def has_coord_tokens(self) -> bool:
        """Whether coordinates are coordinate tokens, which distributions, readouts and coordinate losses need."""

    @abstractmethod
    def serialize(self, objects: Iterable[BoxObject]) -> str:
        """The answer that names `objects` in their order, without the final `<|im_end|>`.

        Raises RecordError for an object that cannot be written.
        """

    @abstractmethod
    def written_desc(self, desc: str) -> str:
        """A description as it stands in an answer, without what encloses it."""

    @abstractmethod
    def append_fragment(self, objects: Iterable[BoxObject], prefix_text: str) -> str:
        """The text that completes an append-ready prefix (see `codec.parse`) with `objects`.

        Raises RolloutError for another prefix, RecordError for an object that cannot be written.
        """

    @abstractmethod
    def parse(self, token_ids: Iterable[int], tok: Tokenizer, *, allow_poly: bool = True) -> ParsedRollout:
        """Objects and prefix of one response; strict, without repair."""

    @abstractmethod
    def token_types(self, token_ids: Sequence[int], tok: Tokenizer) -> npt.NDArray[np.int8]:
        """TokenType of each token of a supervised answer with its `<|im_end|>`.  int8 [len(token_ids)]."""

    @abstractmethod
    def desc_token_positions(self, token_ids: Iterable[int], tok: Tokenizer) -> list[int]:
        """Ascending positions of the tokens that overlap a description."""

    @abstractmethod
    def strict_json(self, text: str) -> str | None:
        """The whole answer as strict JSON with whole numbers for coordinates; None where it is not complete."""

    @abstractmethod
    def bin_of_coord(self, text: str) -> int | None:
        """The bin that one coordinate stands for, from the text of its tokens; None for any other text."""
