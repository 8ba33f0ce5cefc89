"""The checkpoints of a run folder: which are whole, which is the last and which the best, what one lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.prompt import PROMPT_FILE
from coordexp.errors import ConfigError, RecordError
from coordexp.files import atomic_link, read_json

BEST_LINK = "best"
TRAINER_STATE = "trainer_state.json"
"""The last file of a checkpoint that the HF Trainer writes."""
PREFIX_FILE, PREFIX_WEIGHTS = "latent_prefix.json", "latent_prefix.safetensors"
"""Of a latent prefix (`models.latent_prefix.folder`)."""
_ADAPTER_CONFIG = "adapter_config.json"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "global_step*")


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoint folders, steps ascending, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder's name says."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: a process that is killed leaves the state of the trainer out."""
    return _state(checkpoint) is not None and not list(_weight_faults(checkpoint, _kind(checkpoint)))


def is_final(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step of its run; it is written when that step is evaluated."""
    state = _state(checkpoint)
    return state is not None and 0 < int(state["max_steps"]) <= int(state["global_step"])


def last_whole(run: Path) -> Path | None:
    """The whole checkpoint of the greatest step."""
    return next((path for path in reversed(checkpoints_of(run)) if is_whole(path)), None)


def resumable(run: Path) -> Path | None:
    """The last whole checkpoint if training can go on from it, that is if it holds the state of its optimizer."""
    last = last_whole(run)
    if last is None or not any(file for pattern in _OPTIMIZERS for file in last.glob(pattern)):
        return None
    return last


def best_of(run: Path) -> Path | None:
    """The checkpoint of the best evaluation by the state of the last whole one; None where no evaluation picked one."""
    last = last_whole(run)
    state = None if last is None else _state(last)
    step = None if state is None else state.get("best_global_step")
    checkpoint = run / f"checkpoint-{step}"
    return checkpoint if step is not None and is_whole(checkpoint) else None


def mend_best_link(run: Path) -> Path | None:
    """`best_of`, with the link `best` led there, which a process that is killed may not have come to."""
    best = best_of(run)
    link = run / BEST_LINK
    if best is not None and (not link.is_symlink() or link.resolve() != best.resolve()):
        atomic_link(link, best.name)
    return best


def base_of(checkpoint: Path) -> str | None:
    """The model under an adapter; None for a whole model."""
    path = checkpoint / _ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = read_json(path, error=ConfigError).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ConfigError(
            f"{path}: base_model_name_or_path is missing; expected the model under the adapter."
        )
    return base


def missing_files(checkpoint: Path, resolved: Mapping[str, Any]) -> list[str]:
    """What a checkpoint lacks of all that is needed to load it again, one sentence each.

    resolved: the run's resolved_config.json.
    """
    from coordexp.models.coord_offset import OFFSET_FILE
    from coordexp.models.model_files import PROCESSOR_FILES

    is_adapter = str(resolved["swift"].get("tuner_type", "full")) != "full"
    kind = "adapter" if is_adapter else "model"
    found = list(_weight_faults(checkpoint, kind))
    config = _ADAPTER_CONFIG if is_adapter else "config.json"
    if not (checkpoint / config).is_file():
        found.append(f"{config}: the configuration of the {kind}")
    if resolved.get("custom", {}).get("coord_offset", {}).get("enabled"):
        found += _tensor_faults(checkpoint / OFFSET_FILE, "the offsets of the coordinate tokens")
    if resolved.get("custom", {}).get("latent_prefix") is not None:
        found += _tensor_faults(checkpoint / PREFIX_WEIGHTS, "the weights of the latent prefix")
        if not (checkpoint / PREFIX_FILE).is_file():
            found.append(f"{PREFIX_FILE}: the settings of the latent prefix")
    if not (checkpoint / PROMPT_FILE).is_file():
        found.append(f"{PROMPT_FILE}: the prompt it was trained with")
    folder, where = checkpoint, ""
    if is_adapter:  # its tokenizer and processor are those of the model under it
        base = base_of(checkpoint) if (checkpoint / _ADAPTER_CONFIG).is_file() else None
        if base is None or not Path(base).is_dir():
            return found
        folder, where = Path(base), f"{base}/"
    for names, what in (
        (("tokenizer_config.json",), "the settings of the tokenizer"),
        (("tokenizer.json", "vocab.json"), "the vocabulary of the tokenizer"),
        (PROCESSOR_FILES[:2], "the settings of the image processor"),
    ):
        if not any((folder / name).is_file() for name in names):
            found.append(f"{where}{' or '.join(names)}: {what}")
    return found


def _kind(checkpoint: Path) -> str:
    return "adapter" if (checkpoint / _ADAPTER_CONFIG).is_file() else "model"


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint; None where it is not there or torn."""
    try:
        found = read_json(checkpoint / TRAINER_STATE, allow_nan=True)
    except RecordError:
        return None
    return found if isinstance(found, dict) else None


def _weight_faults(checkpoint: Path, kind: str) -> Iterator[str]:
    """Weight files that are not there or torn. kind: model or adapter."""
    stem = {"model": ("model", "pytorch_model"), "adapter": ("adapter_model", "adapter_model")}[kind]
    index = checkpoint / f"{stem[0]}.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (RecordError, KeyError, AttributeError):
            yield f"{index.name}: broken; the list of weight files"
            return
        for shard in shards:
            yield from _tensor_faults(checkpoint / shard, f"weights of the {kind}")
    elif not any(checkpoint.glob(f"{stem[1]}*.bin")):
        yield from _tensor_faults(checkpoint / f"{stem[0]}.safetensors", f"weights of the {kind}")


def _tensor_faults(path: Path, what: str) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        yield f"{path.name}: {what}"
        return
    try:
        with safe_open(
            path, framework="np"
        ) as tensors:  # reads the header, and compares the length of the file
            tensors.keys()
    except SafetensorError as error:
        yield f"{path.name}: broken ({error}); {what}"
