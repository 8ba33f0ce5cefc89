"""Python code that comes with a model: refused before anything loads the model, unless the user allows it.

ms-swift 4.6 reads the configuration of every model, and starts vLLM, with transformers' `trust_remote_code` set. A
folder whose configuration names code of its own (`auto_map`) would run it. So each folder is looked at first; the
loaders and engines of this folder are told besides not to run any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError

logger = logging.getLogger(__name__)

TRUST_SETTING, TRUST_FLAG = "custom.trust_remote_code: true", "--trust-remote-code"
"""How a run, and a command, allow it."""
AUTO_MAP = "auto_map"
CONFIG_FILES = "*config.json"  # of model, tokenizer, processor, pictures, generation


def check_remote_code(folder: str | Path, *, trusted: bool, setting: str) -> None:
    """Look for code of its own in a model folder, before anything is loaded from it.

    trusted: the user allows it; a warning says what will run.
    setting: by which the user allows it, as errors name it.

    Raises:
        ConfigError: there is some, and the user does not allow it.
    """
    found = [f"{name}: {what}" for name, what in _named_code(Path(folder))]
    if not found:
        return
    if not trusted:
        raise ConfigError(
            f"{folder} comes with Python code that loading it would run ({'; '.join(found)}). If you trust where it "
            f"comes from, allow it with {setting}; otherwise take {AUTO_MAP} out of the file. Nothing was loaded."
        )
    logger.warning("%s: Python code that comes with %s runs here (%s).", setting, folder, "; ".join(found))


def check_models(
    model: str | None,
    checkpoints: Iterable[str],
    *,
    trusted: bool,
    setting: str,
    hub: Mapping[str, Any],
) -> None:
    """`check_remote_code` of what ms-swift is about to load; of a hub's model the configuration is fetched first.

    model: the flag; without it ms-swift takes what its `checkpoints` (adapters) were trained from.
    hub: ms-swift's `model_revision`, `use_hf` and `hub_token`.

    Raises ConfigError as `check_remote_code` does, and for a model that is neither a folder nor can be fetched.
    """
    models = [model] if model else list(_models_of(checkpoints))
    for name in dict.fromkeys(models):
        folder = Path(name).expanduser()
        check_remote_code(
            folder if folder.is_dir() else _fetched(name, hub), trusted=trusted, setting=setting
        )


def _models_of(checkpoints: Iterable[str]) -> Iterator[str]:
    """What ms-swift has written into its checkpoints about the model they belong to."""
    for checkpoint in checkpoints:
        for name, key in (("args.json", "model"), ("adapter_config.json", "base_model_name_or_path")):
            model = _json_object(Path(checkpoint) / name).get(key)
            if isinstance(model, str):
                yield model
                break


def _fetched(model: str, hub: Mapping[str, Any]) -> Path:
    from swift.utils import safe_snapshot_download

    try:
        folder = safe_snapshot_download(
            model,
            revision=hub["model_revision"],
            download_model=False,
            use_hf=hub["use_hf"],
            hub_token=hub["hub_token"],
        )
    except Exception as error:
        raise ConfigError(
            f"model {model}: no such folder, and no hub gave its configuration: {type(error).__name__}: {error}"
        ) from error
    return Path(folder)


def _named_code(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, what it names) of all configuration files."""
    for path in sorted(folder.glob(CONFIG_FILES)):
        for entry in _auto_maps(_json_object(path)):
            yield path.name, f"{AUTO_MAP} {json.dumps(entry)}"


def _auto_maps(value: Any) -> Iterator[Any]:
    """What `auto_map` holds, wherever it stands."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and value.get(AUTO_MAP):
        yield value[AUTO_MAP]
    for child in children:
        yield from _auto_maps(child)


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none. One that is broken is left to whoever loads it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
