"""EncodedSample: one prompt and its target as token ids, with everything the losses need to know about each.

Ground-truth samples (stage 1, channel A) and rollout samples (channel B) are the same type; only the roles
differ. A sample checks itself when it is made, so that whoever holds one can rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from torch import Tensor

from coordexp.codec.schema import CONTAINER_CLOSE, IM_END, NUM_BINS
from coordexp.codec.token_types import TokenType
from coordexp.errors import ContractError
from coordexp.geometry import IntArray
from coordexp.targets.roles import SLOT_ROLES, Int8Array, TokenRole


@dataclass(frozen=True, eq=False)
class Media:
    """The images of a prompt as Qwen's processor gives them, on the host."""

    pixel_values_PD: Tensor
    """float [P, D]: flattened patches of all images, in the order of their placeholders."""
    image_grid_thw_I3: IntArray
    """int64 [I, 3]: frames, patch rows and patch columns of each image; their products sum to P."""


@dataclass(frozen=True, slots=True)
class PrefixEdits:
    """What was changed in a rollout before it is taught, in objects."""

    num_duplicates: int = 0
    """Second copies that left."""
    num_replaced: int = 0
    """Predictions that made room for a missed object."""
    num_unmatched: int = 0
    """Other predictions without a partner that left."""
    num_written: int = 0
    """Missed objects that stand before the end of the model's own records."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedSample:
    """Token ids, roles and types of prompt + target, and the coordinate slots to supervise.

    All positions count from the first prompt token. Arrays are read-only. Raises ContractError, naming the
    sample, when roles, types, slots and the end of the target do not fit together.
    """

    sample_id: str
    """For messages: the data line or request the sample was made from."""
    token_ids_T: IntArray
    """int64 [T]: prompt (image placeholders expanded), target, and its final `<|im_end|>`."""
    roles_T: Int8Array
    """int8 [T] of TokenRole."""
    types_T: Int8Array
    """int8 [T] of TokenType; IGNORE for the prompt."""
    prompt_length: int
    """Tokens of the prompt; at least 1, since each target token is predicted by the one before it."""
    prefix_length: int = 0
    """Target tokens before what is appended: the model's own, with missed objects that were written among them; 0 for
    ground truth. (A last one that is spelled anew is appended.)"""
    target_text: str
    """What the target's tokens decode to, `<|im_end|>` included."""
    box_positions_B4: IntArray
    """int64 [B, 4]: tokens of x1, y1, x2, y2 of each supervised box."""
    box_bins_B4: IntArray
    """int64 [B, 4]: true bins of these slots (in a matched prediction not those of the tokens)."""
    poly_positions_N: IntArray
    """int64 [N]: tokens of the vertices of all supervised polygons, x before y."""
    poly_bins_N: IntArray
    """int64 [N]: true bins of these slots."""
    name_positions_M: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 [M]: tokens in names of matched predictions that are taught."""
    name_ids_M: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64 [M]: what is taught there: the token itself, or the true name's where the two first differ."""
    num_matched: int = 0
    """Predictions in the prefix that have a partner."""
    dropped_invalid: bool = False
    """The parser refused at least one prediction of the rollout as invalid."""
    closing: str = CONTAINER_CLOSE
    """What the form of the answer closes with."""
    coords_are_text: bool = False
    """Coordinates are written as numbers, which the cross-entropy teaches; there are no slots."""
    edits: PrefixEdits = PrefixEdits()
    """What the rollout lost and got before it became a target."""
    media: Media | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("roles_T", "types_T"):
            self._freeze(name, np.int8)
        for name in ("token_ids_T", "box_positions_B4", "box_bins_B4", "poly_positions_N", "poly_bins_N"):
            self._freeze(name, np.int64)
        for name in ("name_positions_M", "name_ids_M"):
            self._freeze(name, np.int64)
        fault = _layout_fault(self) or _end_fault(self) or _slot_fault(self) or _name_fault(self)
        if fault:
            raise ContractError(f"sample {self.sample_id}: {fault}")

    def _freeze(self, name: str, dtype: type[np.integer]) -> None:
        array = np.array(getattr(self, name), dtype=dtype)
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def num_boxes(self) -> int:
        """B."""
        return len(self.box_positions_B4)

    @property
    def target_ids(self) -> IntArray:
        """Ids after the prompt, `<|im_end|>` included."""
        return self.token_ids_T[self.prompt_length :]

    @property
    def appended_length(self) -> int:
        """Target tokens after the rollout's prefix, `<|im_end|>` included."""
        return self.num_tokens - self.prompt_length - self.prefix_length


class SampleDropReason(StrEnum):
    """Why a rollout gives no sample: the end of its target cannot be located for certain."""

    PREFIX_NOT_OPEN = "prefix_not_open"
    """The prefix is no open container, so there is no place for the missed objects and the closing `]}`."""
    TAIL_CHANGED = "tail_changed"
    """The tokenizer does not keep the appended text, so its closing `]}` is at no known token."""


@dataclass(frozen=True, slots=True)
class DroppedSample:
    """Stands for a sample that was not built. Count it as `stage2_ab/channel_b/closure_supervision/N_drop`."""

    sample_id: str
    reason: SampleDropReason
    detail: str
    """What was found, for logs."""


def _layout_fault(sample: EncodedSample) -> str | None:
    num_tokens, prompt = sample.num_tokens, sample.prompt_length
    for name in ("token_ids_T", "roles_T", "types_T"):
        shape = getattr(sample, name).shape
        if shape != (num_tokens,):
            return f"{name} has shape {shape}, expected ({num_tokens},) as there are {num_tokens} token ids"
    if not 1 <= prompt < num_tokens:
        return f"prompt_length is {prompt}, expected 1..{num_tokens - 1} of {num_tokens} tokens"
    if sample.prefix_length < 0 or sample.appended_length < 0:
        return f"prefix_length is {sample.prefix_length} in a target of {num_tokens - prompt} tokens"
    for name, is_prompt_T in (
        ("roles_T", sample.roles_T == TokenRole.PROMPT),
        ("types_T", sample.types_T == TokenType.IGNORE),
    ):
        if not is_prompt_T[:prompt].all() or is_prompt_T[prompt:].any():
            return f"{name} does not mark exactly the first {prompt} tokens as prompt"
    return None


def _end_fault(sample: EncodedSample) -> str | None:
    """The target ends in its only `<|im_end|>`, with the closing tokens right before it."""
    last = sample.num_tokens - 1
    for name, is_eos_T in (
        ("role", sample.roles_T == TokenRole.EOS),
        ("type", sample.types_T == TokenType.EOS),
    ):
        found = np.flatnonzero(is_eos_T).tolist()
        if found != [last]:
            return f"tokens of {name} EOS are at {found}, expected only the last one, {last}"
    closing = np.flatnonzero(sample.roles_T == TokenRole.CLOSURE)
    if closing.size == 0 or not np.array_equal(closing, np.arange(last - closing.size, last)):
        return f"CLOSURE tokens are at {closing.tolist()}, expected one or more right before token {last}"
    if not sample.target_text.endswith(sample.closing + IM_END):
        return f"the target ends in {sample.target_text[-40:]!r}, expected {sample.closing + IM_END!r}"
    return None


def _slot_fault(sample: EncodedSample) -> str | None:
    """Supervised coordinates are coordinate tokens of the target, each once, with a bin in range."""
    boxes, polys = sample.box_positions_B4, sample.poly_positions_N
    if boxes.ndim != 2 or boxes.shape[1] != 4 or polys.ndim != 1:
        return f"slots have shapes {boxes.shape} and {polys.shape}, expected [B, 4] boxes and [N] vertices"
    if sample.box_bins_B4.shape != boxes.shape or sample.poly_bins_N.shape != polys.shape:
        return f"bins have shapes {sample.box_bins_B4.shape} and {sample.poly_bins_N.shape}, slots others"
    positions = np.concatenate([boxes.ravel(), polys])
    bins = np.concatenate([sample.box_bins_B4.ravel(), sample.poly_bins_N])
    outside = positions[(positions < sample.prompt_length) | (positions >= sample.num_tokens)]
    if outside.size:
        return (
            f"supervised coordinate at token {outside[0]} is outside the assistant's tokens "
            f"{sample.prompt_length}..{sample.num_tokens - 1}"
        )
    is_slot = (sample.types_T[positions] == TokenType.COORD) & np.isin(sample.roles_T[positions], SLOT_ROLES)
    if not is_slot.all():
        at = int(positions[~is_slot][0])
        role, token_type = TokenRole(sample.roles_T[at]).name, TokenType(sample.types_T[at]).name
        return f"supervised coordinate at token {at}, which has role {role} and type {token_type}"
    if len(np.unique(positions)) != len(positions):
        return "a coordinate token is supervised twice"
    if bins.size and not (bins.min() >= 0 and bins.max() < NUM_BINS):
        return f"true bins reach from {bins.min()} to {bins.max()}, expected 0..{NUM_BINS - 1}"
    return None


def _name_fault(sample: EncodedSample) -> str | None:
    """Taught names are text of matched predictions, each token once."""
    positions, ids = sample.name_positions_M, sample.name_ids_M
    if positions.ndim != 1 or ids.shape != positions.shape:
        return f"{positions.shape} tokens of names are taught {ids.shape} ids"
    if len(np.unique(positions)) != len(positions):
        return "a token of a name is taught twice"
    inside = (positions >= sample.prompt_length) & (positions < sample.num_tokens)
    roles, types = (array[positions[inside]] for array in (sample.roles_T, sample.types_T))
    is_text = (roles == TokenRole.MATCHED_PREFIX) & np.isin(types, (TokenType.DESC, TokenType.STRUCT))
    if not inside.all() or not is_text.all():
        return f"a taught name is at tokens {positions.tolist()}, not all of which are text of matched predictions"
    return None
