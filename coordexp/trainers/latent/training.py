"""The prefix as a run trains and keeps it: its parameter group, its files in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coordexp.config.schema.latent_prefix import LatentPrefixSettings
from coordexp.errors import ConfigError
from coordexp.models.latent_prefix.folder import (
    PREFIX_FILE,
    base_hash,
    base_probe,
    load_weights,
    read_prefix,
    trained_state,
    write_prefix,
)
from coordexp.trainers.start.latent import ATTRIBUTE, NO_ZERO3, prefix_of


class PrefixTraining:
    """The prefix of the model of a trainer.

    Arguments:
        model: as the trainer holds it, under LoRA or not.
        learning_rate: of the run.
        deepspeed: its configuration, if it runs.

    Raises ConfigError: no prefix in the model, or DeepSpeed with ZeRO-3 or an optimizer of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LatentPrefixSettings,
        learning_rate: float,
        deepspeed: Mapping[str, Any] | None,
    ) -> None:
        if deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
            raise ConfigError(NO_ZERO3)
        if deepspeed is not None and "optimizer" in deepspeed:
            raise ConfigError(
                "custom.latent_prefix: the DeepSpeed configuration has an `optimizer`, which would train the prefix "
                "with the settings of all other weights; remove that entry (the run's own optimizer is used then)."
            )
        self.prefix = prefix_of(model)
        self._model, self._settings = model, settings
        self._rate = settings.learning_rate or learning_rate
        self._deep_rate = (settings.deep.learning_rate if settings.deep is not None else None) or self._rate
        if settings.language_model == "frozen":
            model.requires_grad_(False)
        self.prefix.requires_grad_(True)  # LoRA and freezing leave only what they know to be trained

    def sum_of_weights(self) -> Tensor:
        """A number that every weight of the prefix takes part in."""
        return torch.stack([weight.sum() for weight in self.prefix.parameters()]).sum()

    def use_own_rates(self, optimizer: Optimizer) -> None:
        """Move the prefix from the parameter groups of a fresh optimizer to a last one, and its deep part behind it."""
        known = {id(weight) for weight in self.prefix.parameters()}
        for group in optimizer.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in known]
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        deep = [] if self.prefix.deep is None else list(self.prefix.deep.parameters())
        of_deep = {id(weight) for weight in deep}
        others = [weight for weight in self.prefix.parameters() if id(weight) not in of_deep]
        for weights, rate in ((others, self._rate), (deep, self._deep_rate)):
            if weights:
                decay = self._settings.weight_decay
                optimizer.add_param_group({"params": weights, "lr": rate, "weight_decay": decay})

    def save(
        self,
        folder: str | Path,
        tokenizer: Any,
        *,
        keep_prob: float,
        prompt: str | None,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        """Write the prefix beside the other files of a checkpoint. state: tensors of the model, where gathered."""
        gathered = None
        if state is not None:
            marker = f"{ATTRIBUTE}."
            gathered = {name.rpartition(marker)[2]: t for name, t in state.items() if marker in name}
        write_prefix(
            folder,
            trained_state(
                self.prefix,
                keep_prob=keep_prob,
                base=base_hash(self._model, tokenizer),
                probe=base_probe(self._model, tokenizer),
                prompt=prompt,
                gathered=gathered or None,
            ),
        )

    def restore(self, folder: str | Path) -> None:
        """Read the prefix of a checkpoint of this run."""
        saved = read_prefix(folder)
        if saved is None:
            raise ConfigError(f"{folder}: no {PREFIX_FILE} there; it is no checkpoint of this run.")
        load_weights(self.prefix, saved, source=folder)
