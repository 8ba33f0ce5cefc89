"""Turn a checkpoint of the coord-offset adapter into a plain one that any tool loads.

    coordexp model merge-offset --model runs/NAME/checkpoint-100 --output runs/models/merged

A LoRA checkpoint is merged into its base model on the way. Logits stay what they were, up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from coordexp.errors import ConfigError
from coordexp.files import read_json
from coordexp.models.coord_offset import OFFSET_FILE, attach_saved_offset, coord_offset_of, fold_coord_offset
from coordexp.models.coord_tokens import save_processor
from coordexp.models.staging import staged_directory

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"


def merge_offset(checkpoint: str | Path, output_dir: str | Path, *, base: str | Path | None = None) -> bool:
    """Write `checkpoint` with offsets (and LoRA) folded into its weights; weights keep their dtype.

    Arguments:
        base: model that a LoRA checkpoint belongs to, folder or hub id; by default the one it names itself.
    Returns whether embedding and head, tied before, had to become two matrices.

    Raises:
        ConfigError: `checkpoint` holds no offsets or is no checkpoint, or `output_dir` is not empty.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / OFFSET_FILE).is_file():
        raise ConfigError(
            f"{checkpoint}: no {OFFSET_FILE} there, expected a checkpoint of a run with custom.coord_offset.enabled; "
            "without that file there is nothing to merge."
        )
    source = base or (base_model(checkpoint) if is_adapter(checkpoint) else checkpoint)
    with staged_directory(Path(output_dir)) as staging_dir:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
        attach_saved_offset(model, checkpoint)
        if is_adapter(checkpoint):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()
        offset = coord_offset_of(model)
        unties = offset is not None and offset.unties
        fold_coord_offset(model)
        model.save_pretrained(staging_dir)
        save_processor(AutoProcessor.from_pretrained(source), staging_dir)
    return unties


def with_adapter(model: PreTrainedModel, checkpoint: str | Path) -> PreTrainedModel | PeftModel:
    """`model` as a run left it in `checkpoint`: offsets attached and LoRA loaded, each where the folder holds it."""
    attach_saved_offset(model, checkpoint)
    if not is_adapter(checkpoint):
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(checkpoint))


def is_adapter(checkpoint: str | Path) -> bool:
    """Does the folder hold LoRA weights rather than a model?"""
    return (Path(checkpoint) / ADAPTER_CONFIG).is_file()


def base_model(checkpoint: str | Path) -> str:
    """The model that LoRA weights belong to, as written in their configuration."""
    path = Path(checkpoint) / ADAPTER_CONFIG
    base = read_json(path, error=ConfigError).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{path}: no base_model_name_or_path; name the model with --base.")
    return str(base)
