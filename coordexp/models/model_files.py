"""The files of a model folder beside its weights: tokenizer, chat template, processor, prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from coordexp.config.prompt import read_prompt, write_prompt
from coordexp.errors import ConfigError
from coordexp.files import read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Of both generations of transformers; newer releases write the first alone."""

PREFIX_FILES = ("latent_prefix.json", "latent_prefix.safetensors")
"""Of a latent prefix (`coordexp.models.latent_prefix.folder`)."""

_NOTES = ("is_local", "local_files_only")


def save_processor(processor: ProcessorMixin | PreTrainedTokenizerBase, directory: Path) -> None:
    """Save a processor as it was published, without the notes that loading from a folder leaves in its tokenizer."""
    forget_loading(processor.tokenizer if isinstance(processor, ProcessorMixin) else processor)
    processor.save_pretrained(directory)


def forget_loading(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take out of a tokenizer what its files are not to say: how it was loaded."""
    for note in _NOTES:
        tokenizer.init_kwargs.pop(note, None)


def copy_processor(source: str | Path, directory: Path) -> None:
    """Put tokenizer, chat template and processor of a model into `directory`, as they are.

    source: folder or hub id.  Raises ConfigError for a folder without a tokenizer.
    """
    folder = Path(source)
    if not folder.is_dir():
        save_processor(AutoProcessor.from_pretrained(source), directory)
        return
    found = [name for name in (*TOKENIZER_FILES, *PROCESSOR_FILES) if (folder / name).is_file()]
    if "tokenizer_config.json" not in found:
        raise ConfigError(f"{folder}: no tokenizer_config.json there; expected a model with its tokenizer.")
    for name in found:
        shutil.copyfile(folder / name, directory / name)


def carry_prompt(sources: list[str | Path], directory: Path) -> None:
    """Give `directory` the prompt of the first of `sources` that holds one, and its processor the limits of that.

    Nothing where none does.
    """
    record = next((found for folder in sources if (found := read_prompt(folder)) is not None), None)
    if record is None:
        return
    write_prompt(directory, record.prompt)
    write_pixel_limits(directory, record.prompt.min_pixels, record.prompt.max_pixels)


def carry_prefix(checkpoint: Path, directory: Path) -> None:
    """Give `directory`, a whole model, the latent prefix of a checkpoint, where that holds one.

    An index then says which file has the weights of the model: vLLM takes every safetensors file for them without.
    """
    if not (checkpoint / PREFIX_FILES[0]).is_file():
        return
    for name in PREFIX_FILES:
        shutil.copyfile(checkpoint / name, directory / name)
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        with safe_open(directory / "model.safetensors", framework="pt") as weights:
            names = list(weights.keys())
        write_json(index, {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})


def write_pixel_limits(directory: Path, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the limits of pictures in the processor's files of a folder; None leaves one as it is."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = directory / name
        content = read_json(path, error=ConfigError) if path.is_file() else {}
        settings = content.get("image_processor", {}) if name == "processor_config.json" else content
        if not settings.get("size"):
            continue
        before = dict(settings["size"])
        settings["size"] |= {"shortest_edge": min_pixels} if min_pixels else {}
        settings["size"] |= {"longest_edge": max_pixels} if max_pixels else {}
        if settings["size"] != before:
            write_json(path, content)
