"""Samples -> the tensors of one forward: packed into one sequence, or padded into a batch.

    batch = pack_samples(samples, layout)
    logits = model(**batch.model_inputs()).logits      # batch.starts index the flattened [B * T]

A pack keeps samples apart by the first row of its position ids (see `coordexp.packing.position_ids`): no
attention mask, no cache. Flash attention then runs with variable lengths, sdpa, eager and flex attention with
a mask transformers makes. For anything else, `mask_dtype` adds the block-diagonal mask itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from coordexp.errors import ContractError
from coordexp.geometry import IntArray
from coordexp.packing.position_ids import VisionLayout, position_ids


class Pixels(Protocol):
    """The images of a sample."""

    @property
    def pixel_values_PD(self) -> Tensor: ...
    @property
    def image_grid_thw_I3(self) -> np.ndarray: ...


class Segment(Protocol):
    """What packing needs to know of an encoded sample."""

    @property
    def sample_id(self) -> str: ...
    @property
    def token_ids_T(self) -> IntArray: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def media(self) -> Pixels | None: ...


S = TypeVar("S", bound=Segment)


@dataclass(frozen=True, eq=False)
class SampleBatch(Generic[S]):
    """Inputs of one forward over whole samples."""

    samples: tuple[S, ...]
    """In the order they lie in the batch."""
    starts: tuple[int, ...]
    """Where each sample begins in the flattened [B * T] batch."""
    input_ids_BT: Tensor
    """int64 [B, T]; B = 1 for a pack."""
    position_ids_4BT: Tensor
    """int64 [4, B, T]: text, time, height, width."""
    attention_mask: Tensor | None
    """Padded: int64 [B, T], 1 on tokens. Packed: None, or the mask [1, 1, T, T] of `block_causal_mask`."""
    pixel_values_PD: Tensor | None
    """float [P, D]: patches of all images, sample by sample; None without images."""
    image_grid_thw_I3: Tensor | None
    """int64 [I, 3], sample by sample; None without images."""

    @property
    def num_samples(self) -> int:
        """Raw samples in the forward."""
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, padding not counted."""
        return sum(sample.num_tokens for sample in self.samples)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a Qwen3-VL model; what is None is left out. No cache (it would mix packs)."""
        inputs = {
            "input_ids": self.input_ids_BT,
            "position_ids": self.position_ids_4BT,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values_PD,
            "image_grid_thw": self.image_grid_thw_I3,
        }
        return {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}


def pack_samples(
    samples: Sequence[S], layout: VisionLayout, *, mask_dtype: torch.dtype | None = None
) -> SampleBatch[S]:
    """All samples one after another in one sequence.

    mask_dtype: also give the explicit mask of `block_causal_mask`, for attention implementations that do not
    read position ids; its memory grows with the square of the pack.
    """
    _check_some(samples)
    lengths = [sample.num_tokens for sample in samples]
    input_ids_T = np.concatenate([sample.token_ids_T for sample in samples])
    position_ids_4T = np.concatenate([_position_ids(sample, layout) for sample in samples], axis=1)
    return SampleBatch(
        tuple(samples),
        tuple(accumulate(lengths[:-1], initial=0)),
        torch.from_numpy(input_ids_T)[None],
        torch.from_numpy(position_ids_4T)[:, None],
        None if mask_dtype is None else block_causal_mask(lengths, mask_dtype),
        *_media(samples),
    )


def pad_samples(samples: Sequence[S], layout: VisionLayout, *, pad_token_id: int) -> SampleBatch[S]:
    """One sample per row, padded on the right; padding has position 0."""
    _check_some(samples)
    width = max(sample.num_tokens for sample in samples)
    input_ids_BT = torch.full((len(samples), width), pad_token_id, dtype=torch.int64)
    position_ids_4BT = torch.zeros(4, len(samples), width, dtype=torch.int64)
    attention_mask_BT = torch.zeros(len(samples), width, dtype=torch.int64)
    for b, sample in enumerate(samples):
        input_ids_BT[b, : sample.num_tokens] = torch.from_numpy(sample.token_ids_T.copy())
        position_ids_4BT[:, b, : sample.num_tokens] = torch.from_numpy(_position_ids(sample, layout))
        attention_mask_BT[b, : sample.num_tokens] = 1
    return SampleBatch(
        tuple(samples),
        tuple(range(0, len(samples) * width, width)),
        input_ids_BT,
        position_ids_4BT,
        attention_mask_BT,
        *_media(samples),
    )


def block_causal_mask(lengths: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
    """Attention mask of a pack: a token sees itself and what is before it in its own sample.

    dtype: bool (True: may attend; for sdpa), or a float type (0 and its most negative number, to be added to
    attention scores; for eager attention).  Returns [1, 1, T, T], T = sum(lengths).
    """
    sample_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed_TT = (sample_T[:, None] == sample_T[None, :]).tril()[None, None]
    if dtype == torch.bool:
        return allowed_TT
    return torch.zeros(allowed_TT.shape, dtype=dtype).masked_fill_(~allowed_TT, torch.finfo(dtype).min)


def _position_ids(sample: Segment, layout: VisionLayout) -> np.ndarray:
    grids = np.zeros((0, 3), dtype=np.int64) if sample.media is None else sample.media.image_grid_thw_I3
    try:
        return position_ids(sample.token_ids_T, grids, layout)
    except ContractError as error:
        raise ContractError(f"sample {sample.sample_id}: {error}") from error


def _media(samples: Sequence[Segment]) -> tuple[Tensor | None, Tensor | None]:
    """Patches and grids of all images, in the order of their placeholders."""
    media = [sample.media for sample in samples if sample.media is not None]
    if not media:
        return None, None
    grids_I3 = np.concatenate([one.image_grid_thw_I3 for one in media]).astype(np.int64)
    return torch.cat([one.pixel_values_PD for one in media]), torch.from_numpy(grids_I3)


def _check_some(samples: Sequence[Segment]) -> None:
    if not samples:
        raise ContractError("no samples: a forward needs at least one")
