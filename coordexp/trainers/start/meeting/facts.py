"""What a rank tells the others before anything is loaded: its settings, and what lies under the paths of the run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import coordexp
from coordexp.config import Sections
from coordexp.config.run.resolved import SECRETS

PATH_ARGUMENTS = frozenset(
    {
        "adapters", "dataset", "external_plugins", "logging_dir", "model", "output_dir", "resume_from_checkpoint",
        "run_name", "val_dataset",
    }
)  # fmt: skip
"""ms-swift arguments that may be written differently on every node; what lies there is compared where it matters."""
PACKAGES = ("accelerate", "deepspeed", "ms_swift", "peft", "torch", "transformers")
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "MAX_PIXELS",
    "MIN_PIXELS",
)
"""Environment variables that change what a rank trains."""
_OF_A_MODEL = (
    "*.safetensors", "*model*.bin", "*config.json", "*tokenizer*", "vocab.json", "merges.txt", "*.jinja",
    "*prompt.json", "*.py",
)  # fmt: skip
"""Files of a checkpoint that are the same on every node; others tell of the rank that wrote them."""
_READ_WHOLE = 4 << 20
_ENDS = 1 << 20


@dataclass(frozen=True)
class FoundAt:
    """What a rank finds under a path of the run. parts: name of each file -> digest; None: nothing is there."""

    path: str
    parts: Mapping[str, str] | None


@dataclass(frozen=True)
class StartFacts:
    """Of one rank.

    settings: name of a setting -> its value as JSON, or its digest for a secret.  versions: package -> version.
    places: setting with a path (`dataset[0]`) -> what lies there.
    output_dir: absolute, None where the run writes nothing.  sees_output: is it the folder that rank 0 writes to?
    """

    rank: int
    host: str
    node: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    places: Mapping[str, FoundAt]
    output_dir: str | None = None
    sees_output: bool = True

    @property
    def name(self) -> str:
        """As errors call it."""
        return name_of(self.rank, self.host, self.node)

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self), default=dict)

    @classmethod
    def from_json(cls, text: str | bytes) -> StartFacts:
        """What `to_json` wrote."""
        found = json.loads(text)
        places = {name: FoundAt(**place) for name, place in found.pop("places").items()}
        return cls(places=places, **found)


@dataclass(frozen=True)
class OutputFolder:
    """Where a run writes. saves: are checkpoints written?  on_each_node: each node writes its own."""

    path: str | None
    saves: bool
    on_each_node: bool


def name_of(rank: int, host: str, node: str) -> str:
    """Of a rank. node: number of its node, empty where the launcher gives none."""
    return f"rank {rank} on {host}" + (f" (node {node})" if node else "")


def settings_of(swift: Mapping[str, Any], sections: Sections, environ: Mapping[str, str]) -> dict[str, str]:
    """Every setting that must be the same for all ranks, flat. Values with a path in them are left out."""
    found = {
        name: value for name, value in swift.items() if name not in PATH_ARGUMENTS and not _is_path(value)
    }
    found |= {name: value for name, value in _leaves(sections.model_dump(mode="json")) if not _is_path(value)}
    found |= {f"environment variable {name}": environ.get(name) for name in VARIABLES}
    return {name: _shown(name, value) for name, value in found.items() if value is not None}


def output_of(swift: Mapping[str, Any]) -> OutputFolder:
    """The output folder by ms-swift's arguments; its default lies in the working folder."""
    path = os.path.abspath(os.path.expanduser(swift["output_dir"] or "output"))
    saves = str(getattr(swift["save_strategy"], "value", swift["save_strategy"])) != "no"
    return OutputFolder(path, saves, bool(swift["save_on_each_node"]))


def places_of(swift: Mapping[str, Any], data_files: Sequence[str]) -> dict[str, FoundAt]:
    """What lies under the paths that a run reads; names that are no path here (of a hub) have an entry too."""
    found = {"the package coordexp": FoundAt(str(_PACKAGE), {"its sources": _sources_digest()})}
    named = {
        **_numbered("model", [swift["model"]]),
        **_numbered("adapters", swift["adapters"] or ()),
        **_numbered("resume_from_checkpoint", [swift["resume_from_checkpoint"]]),
        **_numbered("data file", list(dict.fromkeys(data_files))),
        **_numbered("external_plugins", swift["external_plugins"] or ()),
        **_numbered("deepspeed", [swift["deepspeed"]] if isinstance(swift["deepspeed"], str) else []),
    }
    return found | {name: place_of(path) for name, path in named.items()}


def place_of(path: str) -> FoundAt:
    """Digests of a file, or of the files of a model in a folder; large ones by size, and data by its two ends too."""
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    if whole.is_file():
        return FoundAt(str(whole), {whole.name: _digest(whole)})
    if whole.is_dir():
        names = sorted(entry.name for entry in whole.iterdir() if _is_of_model(entry))
        return FoundAt(str(whole), {name: _digest(whole / name) for name in names})
    return FoundAt(str(whole) if os.sep in path else path, None)


def versions() -> dict[str, str]:
    """Of the packages that must be the same everywhere."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_PACKAGE = Path(str(coordexp.__file__)).parent


@lru_cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _is_of_model(entry: Path) -> bool:
    return entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in _OF_A_MODEL)


def _digest(path: Path) -> str:
    """Of the content of a small file, of size and both ends of a large one."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= _READ_WHOLE:
            digest.update(stream.read())
        else:
            digest.update(stream.read(_ENDS))
            stream.seek(-_ENDS, os.SEEK_END)
            digest.update(stream.read())
    return f"{size} bytes, sha256 {digest.hexdigest()[:12]}"


def _numbered(name: str, paths: Sequence[str | None]) -> dict[str, str]:
    given = [path for path in paths if path]
    return {name if len(given) == 1 else f"{name} {number}": path for number, path in enumerate(given, 1)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _is_path(value: Any) -> bool:
    """Whether a value has a path in it."""
    if isinstance(value, str):
        return os.sep in value or value.startswith("~")
    if isinstance(value, Mapping):
        return any(_is_path(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_is_path(item) for item in value)


def _shown(name: str, value: Any) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return f"secret {hashlib.sha256(text.encode()).hexdigest()[:8]}" if name in SECRETS else text
