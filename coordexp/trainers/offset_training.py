"""The coord-offset adapter in a run: attached where ms-swift loads the model, trained with its own learning rates,
written into every checkpoint and restored from one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.config.schema.custom import CoordOffset as OffsetSettings
from coordexp.errors import ConfigError
from coordexp.models import coord_offset as adapter
from coordexp.swift_bridge.loading import PrepareModel


def preparation(settings: OffsetSettings, checkpoints: Sequence[str | None]) -> PrepareModel:
    """What a training run does to a model when it is loaded.

    checkpoints: folders the run starts from beside the model's own (to resume, a LoRA checkpoint), those that come
        first win; None stands for one that is not given.

    Raises (the function does):
        ConfigError: a checkpoint holds offsets and the run has no adapter, or another kind of it.
    """

    def prepare(model: Any, tokenizer: Any, model_dir: Path) -> None:
        folders = [*(Path(folder) for folder in checkpoints if folder is not None), model_dir]
        source = next((folder for folder in folders if (folder / adapter.OFFSET_FILE).is_file()), None)
        if not settings.enabled:
            _refuse(source)
            return
        offset = adapter.attach_coord_offset(
            model, CoordVocab.from_tokenizer(tokenizer).ids, tie_head=settings.tie_head
        )
        saved = None if source is None else adapter.read_coord_offset(source)
        if saved is not None and source is not None:
            adapter.restore_coord_offset(offset, saved, source=source)

    return prepare


def restore_for_inference(model: Any, _tokenizer: Any, model_dir: Path) -> None:
    """Give a loaded model the adapter that its folder holds, if any."""
    adapter.attach_saved_offset(model, model_dir)


def refuse_unmerged(folders: Sequence[str]) -> None:
    """ConfigError for LoRA folders that hold offsets, in commands that would load the LoRA weights alone."""
    for folder in folders:
        if (Path(folder) / adapter.OFFSET_FILE).is_file():
            raise ConfigError(
                f"--adapters {folder}: holds offsets of the coordinate tokens ({adapter.OFFSET_FILE}), which this "
                f"command would leave out; run `coordexp model merge --model {folder} --output DIR` and use DIR "
                "as the model."
            )


class OffsetTraining:
    """The adapter of the model of a trainer.

    Arguments:
        model: as the trainer holds it, under LoRA or not.
        learning_rate: of the run.

    Raises:
        ConfigError: the model has no adapter (its model type is not qwen3_vl), or a DeepSpeed configuration brings an
            optimizer of its own, which knows one learning rate only.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OffsetSettings,
        learning_rate: float,
        deepspeed: Mapping[str, Any] | None,
    ) -> None:
        offset = adapter.coord_offset_of(model)
        if offset is None:
            raise ConfigError(
                "custom.coord_offset.enabled: the loaded model has no adapter; it is attached to models that ms-swift "
                "loads as model_type qwen3_vl."
            )
        if deepspeed is not None and "optimizer" in deepspeed:
            raise ConfigError(
                "custom.coord_offset: the DeepSpeed configuration has an `optimizer`, which would train the offsets "
                "with the settings of all other weights; remove that entry (the run's own optimizer is used then)."
            )
        self._model, self._offset = model, offset
        for table_KH in offset.tables.values():
            table_KH.requires_grad_(True)  # LoRA and freezing leave only what they know to be trained
        rates = {"embed": settings.embed_lr, "head": settings.head_lr}
        self._groups = [
            {"params": [table_KH], "lr": rates[key] or learning_rate, "weight_decay": settings.weight_decay}
            for key, table_KH in offset.tables.items()
        ]

    def use_own_rates(self, optimizer: Optimizer) -> None:
        """Move the tables from the parameter groups of a fresh optimizer to groups of their own, the last ones."""
        tables = {id(table_KH) for table_KH in self._offset.tables.values()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in tables]
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        for group in self._groups:
            optimizer.add_param_group(dict(group))

    def save(self, directory: str | Path, state: Mapping[str, Tensor] | None) -> None:
        """Write the tables beside the other files of a checkpoint; `state` as in `save_coord_offset`."""
        adapter.save_coord_offset(self._model, directory, state)

    def restore(self, directory: str | Path) -> None:
        """Read the tables of a checkpoint of this run."""
        saved = adapter.read_coord_offset(directory)
        if saved is None:
            raise ConfigError(
                f"{directory}: no {adapter.OFFSET_FILE} there; it is no checkpoint of this run."
            )
        adapter.restore_coord_offset(self._offset, saved, source=directory)


def _refuse(source: Path | None) -> None:
    if source is not None:
        raise ConfigError(
            f"{source}: a checkpoint with offsets of the coordinate tokens ({adapter.OFFSET_FILE}), but "
            "custom.coord_offset.enabled is false; set it to true, or merge them first (`coordexp model merge`)."
        )
