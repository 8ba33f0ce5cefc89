"""A target in the making: ids, roles and slots, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import DecodedTokens, pieces_of
from coordexp.codec.schema import IM_END, KIND_BBOX, BoxObject
from coordexp.codec.token_types import TokenType
from coordexp.errors import ConfigError, ContractError
from coordexp.geometry import IntArray
from coordexp.targets.names import TaughtNames, taught_names
from coordexp.targets.prefix import TaughtPrefix, prefix_roles
from coordexp.targets.roles import TokenRole
from coordexp.targets.sample import EncodedSample, Media, PrefixEdits

Bins = Sequence[int]


class TargetDraft:
    """Starts as a prompt; takes a rollout's prefix, then the written rest. Positions count from the prompt."""

    def __init__(
        self, prompt_ids: Sequence[int], tok: Tokenizer, *, sample_id: str, form: AnswerForm | None = None
    ) -> None:
        self._tok = tok
        self._form = form or form_of()
        self._pieces = pieces_of(tok)
        self._sample_id = sample_id
        self._ids: list[int] = list(map(int, prompt_ids))
        self._roles: list[int] = [TokenRole.PROMPT] * len(self._ids)
        self._prompt_length = len(self._ids)
        self._prefix_length = 0
        self._data = b""
        self._slots: dict[str, list[tuple[Sequence[int], Bins]]] = {"box": [], "poly": []}
        self._num_matched = 0
        self._dropped_invalid, self._edits = False, PrefixEdits()
        self._names: tuple[IntArray, IntArray] = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def continue_rollout(
        self,
        prefix: TaughtPrefix,
        true_bins: Mapping[int, Bins],
        num_kept: int,
        true_descs: Mapping[int, str] | None = None,
    ) -> None:
        """Take over the first `num_kept` tokens of the prefix, as they are; the rest is yet to be spelled.

        true_bins: for the index of each matched or written object, the true bins of its coordinate tokens. Coordinates
            that are written as numbers have no slots.
        true_descs: for that of each matched prediction its true name, where such names are taught.
        """
        parsed, base = prefix.parsed, len(self._ids)
        written = list(parsed.prefix_token_ids[:num_kept])
        self._ids += written
        self._roles += prefix_roles(prefix, self._pieces)[:num_kept].tolist()
        self._data += self._pieces.join(written)
        for index, bins in true_bins.items() if self._form.has_coord_tokens else ():
            pred = parsed.objects[index]
            self._add_slots([base + at for at in pred.token_positions], pred.kind, bins)
        if true_descs:
            self._teach_names(taught_names(parsed, true_descs, self._tok, num_kept, self._form), base)
        self._prefix_length = num_kept
        self._num_matched = len(prefix.partners)
        self._dropped_invalid, self._edits = prefix.dropped_invalid, prefix.edits

    def _teach_names(self, names: TaughtNames, base: int) -> None:
        """Of the names that lie in matched records alone; a token shared with context is context."""
        positions, ids = np.array(names.positions, dtype=np.int64) + base, np.array(names.ids, dtype=np.int64)
        own = np.array(self._roles, dtype=np.int8)[positions] == TokenRole.MATCHED_PREFIX
        self._names = positions[own], ids[own]

    def append(
        self, tokens: DecodedTokens, objects: Sequence[BoxObject], role: TokenRole, *, untaught: str = ""
    ) -> None:
        """Add the records of `objects` and the form's closing. Each coordinate token is a slot of its own bin.

        untaught: how `tokens` begin when that part is not taught; those that hold nothing else are PREFIX.
        """
        base = len(self._ids)
        closing, _ = tokens.tokens_over(len(tokens.data) - len(self._form.closing), len(tokens.data))
        num_untaught = sum(end <= len(untaught.encode()) for end in tokens.ends)
        self._ids += tokens.ids
        self._roles += [TokenRole.PREFIX] * num_untaught + [role] * (closing - num_untaught)
        self._roles += [TokenRole.CLOSURE] * (len(tokens.ids) - closing)
        self._data += tokens.data
        if not self._form.has_coord_tokens:
            return
        bin_of = self._pieces.coord_vocab.bin_by_id
        positions = [base + at for at, token_id in enumerate(tokens.ids) if token_id in bin_of]
        if [bin_of[self._ids[at]] for at in positions] != [k for obj in objects for k in obj.bins]:
            raise ContractError(
                f"sample {self._sample_id}: the coordinates of {tokens.text[:80]!r}... are not spelled by "
                "their coordinate tokens; does the tokenizer merge across added tokens?"
            )
        start = 0
        for obj in objects:
            self._add_slots(positions[start : start + len(obj.bins)], obj.kind, obj.bins)
            start += len(obj.bins)

    def finish(self, media: Media | None) -> EncodedSample:
        """The sample, with `<|im_end|>` at its end."""
        if self._pieces.im_end_id is None:
            raise ConfigError(
                f"{type(self._tok).__name__} does not encode {IM_END} as one token; is it Qwen's?"
            )
        ids, prompt = [*self._ids, self._pieces.im_end_id], self._prompt_length
        text = (self._data + IM_END.encode()).decode("utf-8", errors="replace")
        types_T = np.full(len(ids), TokenType.IGNORE, dtype=np.int8)
        types_T[prompt:] = self._form.token_types(ids[prompt:], self._tok)
        box_positions, box_bins = self._flat_slots("box")
        poly_positions, poly_bins = self._flat_slots("poly")
        return EncodedSample(
            sample_id=self._sample_id,
            token_ids_T=np.array(ids),
            roles_T=np.array([*self._roles, TokenRole.EOS], dtype=np.int8),
            types_T=types_T,
            prompt_length=prompt,
            prefix_length=self._prefix_length,
            target_text=text,
            box_positions_B4=box_positions.reshape(-1, 4),
            box_bins_B4=box_bins.reshape(-1, 4),
            poly_positions_N=poly_positions,
            poly_bins_N=poly_bins,
            num_matched=self._num_matched,
            dropped_invalid=self._dropped_invalid,
            name_positions_M=self._names[0],
            name_ids_M=self._names[1],
            edits=self._edits,
            closing=self._form.closing,
            coords_are_text=not self._form.has_coord_tokens,
            media=media,
        )

    def _add_slots(self, positions: Sequence[int], kind: str, bins: Bins) -> None:
        self._slots["box" if kind == KIND_BBOX else "poly"].append((positions, bins))

    def _flat_slots(self, shape: str) -> tuple[IntArray, IntArray]:
        slots = self._slots[shape]
        positions = np.array([at for places, _ in slots for at in places], dtype=np.int64)
        return positions, np.array([k for _, bins in slots for k in bins], dtype=np.int64)
