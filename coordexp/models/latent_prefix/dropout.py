"""Latent dropout: whole vectors of a prefix are zero in some samples.

Which ones is a function of a key alone (the run's seed, the step and the sample in training; the prompt in
evaluation), so that it depends neither on batches and ranks nor on what ran before.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor


def keep_mask(keys: Sequence[str], num_latents: int, keep_prob: float) -> Tensor:
    """bool [len(keys), M] on the CPU: each latent is kept with probability `keep_prob`, at least one always is."""
    if keep_prob >= 1:
        return torch.ones(len(keys), num_latents, dtype=torch.bool)
    rows = []
    for key in keys:
        seed = int.from_bytes(sha256(key.encode()).digest()[:7], "big")
        draws_M = torch.rand(num_latents, generator=torch.Generator().manual_seed(seed))
        kept_M = draws_M < keep_prob
        kept_M[draws_M.argmin()] = True
        rows.append(kept_M)
    return torch.stack(rows) if rows else torch.ones(0, num_latents, dtype=torch.bool)


def training_key(seed: int, step: int, sample_id: str) -> str:
    """The key of a sample in an optimizer step: the same wherever its data file lies.

    sample_id: `FILE:LINE`.
    """
    return f"{seed} {step} {Path(sample_id).name}"


def prompt_key(token_ids: Sequence[int]) -> str:
    """The key of a prompt outside training: its text, as token ids."""
    return ",".join(map(str, token_ids))


def drop_latents(vectors_BMH: Tensor, keep_BM: Tensor) -> Tensor:
    """`vectors_BMH` with zeros for the latents that are not kept."""
    return vectors_BMH * keep_BM.to(vectors_BMH.dtype).unsqueeze(-1)
