"""Packs of the training samples of a run (`training.packing`, or ms-swift's own `packing`)."""

from __future__ import annotations

from typing import Any

from coordexp.errors import ConfigError
from coordexp.swift_bridge.packing import pack_dataset, unpacked
from coordexp.trainers.runtime import RunSettings


def pack_datasets(arguments: dict[str, Any], settings: RunSettings) -> None:
    """Replace the datasets among the trainer's `arguments` by their packs where the run asks for it.

    Evaluation samples are packed with `training.eval_packing` only; otherwise the samples of an evaluation batch
    still lie in one sequence, without padding.
    """
    training, swift = settings.sections.training, settings.swift
    if not training.packing and not swift["packing"]:
        return
    template = arguments["template"]
    packing_length = swift["packing_length"] or template.max_length
    if packing_length is None:
        raise ConfigError("packing_length is missing, and no max_length is set; give one of them.")
    for name in ("train_dataset", "eval_dataset"):
        if arguments.get(name) is None:
            continue
        packed = name == "train_dataset" or training.eval_packing
        arguments[name] = (
            pack_dataset(arguments[name], template, packing_length, swift)
            if packed
            else unpacked(arguments[name])
        )
