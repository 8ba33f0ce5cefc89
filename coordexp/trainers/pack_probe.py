"""The check of `models.sample_isolation`, on packs as ms-swift's template collates them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.packing.check import NOT_SUPERVISED
from coordexp.packing.isolation import PROBE_TOKENS, check_samples_kept_apart
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS


def check_template_packs(model: nn.Module, template: Any, device: torch.device) -> None:
    """Do `model` and `template` together keep packed samples apart? ContractError if not.

    template: ms-swift's, collating without padding. All ranks call it together.
    """

    def make_pack(samples: Sequence[Sequence[int]]) -> dict[str, Any]:
        features = [
            {"input_ids": list(ids), "labels": [NOT_SUPERVISED] * len(ids), "length": len(ids)}
            for ids in samples
        ]
        collated = template.data_collator(features)
        return {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in collated.items()
            if key not in SUPERVISION_KEYS
        }

    check_samples_kept_apart(model, make_pack, _ordinary_tokens(template.tokenizer, 3 * PROBE_TOKENS))


def _ordinary_tokens(tokenizer: Any, number: int) -> list[int]:
    """The first ids that are no special or added token."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token_id for token_id in range(len(tokenizer)) if token_id not in special][:number]
