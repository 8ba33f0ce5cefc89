"""Turn a checkpoint of adapters (LoRA, coordinate offsets, or both) into a plain one that any tool loads.

    coordexp model merge --model runs/NAME/checkpoint-100 --output runs/models/merged

Logits stay what they were, up to rounding. Tokenizer, chat template and processor are those of the base model, byte for
byte; the prompt of the checkpoint, and its limits of pictures, come along.

An adapter on embedding or output head of a model that ties the two (PEFT adds both of their changes to the one matrix)
and a copy of one of them that was trained (`modules_to_save`) make two matrices: the configuration says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from coordexp.errors import ConfigError
from coordexp.files import read_json
from coordexp.models.coord_offset import OFFSET_FILE, attach_saved_offset, fold_coord_offset, untie_config
from coordexp.models.model_files import carry_prefix, carry_prompt, copy_processor
from coordexp.models.staging import staged_directory

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"


def merge_offset(checkpoint: str | Path, output_dir: str | Path, *, base: str | Path | None = None) -> bool:
    """Write `checkpoint` with LoRA and offsets folded into its weights; weights keep their dtype.

    Arguments:
        base: model that a LoRA checkpoint belongs to, folder or hub id; by default the one it names itself.
    Returns whether embedding and head, tied before, had to become two matrices.

    Raises:
        ConfigError: `checkpoint` holds no adapter or is no checkpoint, or `output_dir` is not empty.
    """
    checkpoint = Path(checkpoint)
    if not is_adapter(checkpoint) and not (checkpoint / OFFSET_FILE).is_file():
        raise ConfigError(
            f"{checkpoint}: holds neither {ADAPTER_CONFIG} nor {OFFSET_FILE}, expected a checkpoint of a run with LoRA "
            "or custom.coord_offset.enabled; without them there is nothing to merge."
        )
    source = base or (base_model(checkpoint) if is_adapter(checkpoint) else checkpoint)
    with staged_directory(Path(output_dir)) as staging_dir:
        unties = write_merged(checkpoint, source, staging_dir)
        carry_prefix(checkpoint, staging_dir)
        return unties


def write_merged(
    checkpoint: Path,
    source: str | Path,
    folder: Path,
    change: Callable[[PreTrainedModel], object] = lambda _model: None,
) -> bool:
    """Write a checkpoint as a whole model, whatever there is to fold into it, with the files of its processor.

    source: the model that its weights belong to, or itself.  change: done to the whole model before it is written.
    Returns whether embedding and head became two matrices.
    """
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    was_tied = is_tied(model)
    attach_saved_offset(model, checkpoint)
    if is_adapter(checkpoint):
        model = _merged(model, checkpoint)
    fold_coord_offset(model)
    change(model)
    unties = was_tied and not is_tied(model)
    if unties:
        untie_config(model)
    model.save_pretrained(folder)
    copy_processor(source, folder)
    carry_prompt([checkpoint, source], folder)
    return unties


def is_tied(model: PreTrainedModel) -> bool:
    """Are embedding and head one matrix?"""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _merged(model: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """`model` with the LoRA weights of a checkpoint added to its own."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = PeftModel.from_pretrained(model, str(checkpoint))
    ends: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    embedding, head = plain
    if embedding.weight is head.weight and any(isinstance(end, BaseTunerLayer) for end in ends):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


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
