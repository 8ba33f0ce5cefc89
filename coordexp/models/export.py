"""One folder to hand over: adapters and offsets merged, tokenizer, processor, chat template, generation settings.

    coordexp model export --merge runs/NAME/checkpoint-100 --out runs/models/NAME

transformers, vLLM and CoordExp load it and answer alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from coordexp.codec.schema import IM_END
from coordexp.errors import ConfigError
from coordexp.files import read_json, write_json
from coordexp.models.coord_offset import OFFSET_FILE
from coordexp.models.merge_offset import base_model, is_adapter, write_merged
from coordexp.models.model_files import carry_prefix
from coordexp.models.staging import staged_directory

GENERATION_CONFIG = "generation_config.json"
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha",
    "num_beams", "repetition_penalty", "no_repeat_ngram_size", "presence_penalty", "frequency_penalty",
)  # fmt: skip
"""Settings under which a folder would not answer greedily, or would punish the tokens that every object repeats."""


def export_model(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    merge: bool,
    base: str | Path | None = None,
    add: Callable[[Path], object] = lambda _folder: None,
) -> bool:
    """Write `checkpoint` as a whole model with all that is needed to ask it; weights keep their dtype.

    merge: fold in LoRA and offsets, which a checkpoint that has them needs.
    base: model that a LoRA checkpoint belongs to; by default the one it names itself.
    add: called with the unfinished folder, for what else it is to hold; when it fails, nothing is written.

    Returns whether embedding and head, tied before, had to become two matrices.

    Raises:
        ConfigError: no checkpoint there, something to merge without `merge`, or a filled `output_dir`.
    """
    checkpoint = Path(checkpoint)
    has_adapter = is_adapter(checkpoint)
    if not has_adapter and not (checkpoint / "config.json").is_file():
        raise ConfigError(
            f"{checkpoint}: holds neither config.json nor adapter_config.json; expected a checkpoint."
        )
    if not merge and (has_adapter or (checkpoint / OFFSET_FILE).is_file()):
        raise ConfigError(f"{checkpoint}: holds an adapter, which other tools do not load; add --merge.")
    source = base or (base_model(checkpoint) if has_adapter else checkpoint)
    with staged_directory(Path(output_dir)) as folder:
        unties = write_merged(checkpoint, source, folder)
        carry_prefix(checkpoint, folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        AutoProcessor.from_pretrained(folder)  # it must load from there alone
        _answer_greedily(folder, tokenizer.convert_tokens_to_ids(IM_END))
        add(folder)
    return unties


def _answer_greedily(folder: Path, im_end: int) -> None:
    """Generation settings of a detector: the likeliest token, and an end at `<|im_end|>`."""
    path = folder / GENERATION_CONFIG
    found = read_json(path, error=ConfigError) if path.is_file() else {}
    kept = {name: value for name, value in found.items() if name not in _SAMPLING}
    ends = kept.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    write_json(path, {**kept, "do_sample": False, "eos_token_id": list(dict.fromkeys([im_end, *ends]))})
