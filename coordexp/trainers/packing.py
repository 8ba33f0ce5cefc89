"""Packs of the training samples of a run (`training.packing`, or ms-swift's own `packing`), and their check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.packing.isolation import NOT_SUPERVISED, PROBE_TOKENS, check_samples_kept_apart
from coordexp.swift_bridge.packing import pack_dataset, unpacked
from coordexp.swift_bridge.trainer import SUPERVISION_KEYS
from coordexp.trainers.runtime import RunSettings


def pack_datasets(arguments: dict[str, Any], settings: RunSettings) -> None:
    """Replace the datasets among the trainer's `arguments` by their packs where the run asks for it.

    Evaluation samples are packed with `training.eval_packing` only; otherwise the samples of an evaluation batch
    still lie in one sequence, without padding.
    """
    training, swift, template = settings.sections.training, settings.swift, arguments["template"]
    packing_length = packing_length_of(settings, template)
    if packing_length is None:
        return
    for name in ("train_dataset", "eval_dataset"):
        if arguments.get(name) is None:
            continue
        packed = name == "train_dataset" or training.eval_packing
        arguments[name] = (
            pack_dataset(arguments[name], template, packing_length, swift)
            if packed
            else unpacked(arguments[name])
        )


def packing_length_of(settings: RunSettings, template: Any) -> int | None:
    """Most tokens of a pack; None where the run does not pack. ConfigError: packing without a length."""
    swift = settings.swift
    if not settings.sections.training.packing and not swift["packing"]:
        return None
    length: int | None = swift["packing_length"] or template.max_length
    if length is None:
        raise ConfigError("packing_length is missing, and no max_length is set; give one of them.")
    return length


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
