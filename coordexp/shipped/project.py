"""A project of one's own, laid out: run files made from the recipes, folders, a README.

    lay_out(Path("my-detector"))

The folder keeps a list of what was written with a hash of each file. Files as they were written are brought up to
date by the same call; anything else in the way is refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from coordexp.errors import ConfigError, ContractError
from coordexp.files import atomic_folder, read_json, write_json, write_text
from coordexp.shipped import PLUGIN_FILE, configs

STAMP = ".coordexp_project.json"
FOLDERS = ("configs", "data", "models", "runs")
_TEMPLATES = Path(__file__).parent / "project_files"
_IGNORED = "data/\nmodels/\nruns/\n"
_FILL_IN = "   # fill in"
_SMOKE = """\
# Does the installation work? Three steps of stage 1 on a CPU, with a tiny model and synthetic scenes:
#
#   coordexp model tiny --output models/tiny
#   coordexp data shapes --output data/shapes --train 32 --val 8
#   swift sft configs/smoke.yaml             # or: coordexp train configs/smoke.yaml
"""
_STAGE1 = """\
# Stage 1. See the lines marked "fill in", and batch and learning rate, which are starting points for a 4B model.
#
#   coordexp config check configs/stage1.yaml --paths
#   coordexp train configs/stage1.yaml       # NPROC_PER_NODE=8 in front of it: eight devices
"""
_STAGE2 = """\
# Stage 2, two channels: goes on from the best checkpoint of stage 1.
#
#   coordexp config check configs/stage2.yaml --paths
#   coordexp train configs/stage2.yaml       # NPROC_PER_NODE=8 in front of it: eight devices
"""
_DATA = {
    "train_jsonl: data/coco/train.jsonl": f"train_jsonl: data/train.jsonl{_FILL_IN}",
    "val_jsonl: data/coco/val.jsonl": f"val_jsonl: data/val.jsonl{_FILL_IN}",
}


def lay_out(folder: Path) -> bool:
    """Write a project into `folder`; False where it is there already, as this release writes it.

    Raises:
        ConfigError: `folder` is a file, or holds what no earlier call wrote.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder that is new or empty.")
    files = project_files()
    if not folder.exists():
        with atomic_folder(folder) as unfinished:
            _write(unfinished, files)
        return True
    if any(folder.iterdir()):
        _refuse_touched(folder, files)
    if _is_up_to_date(folder, files):
        return False
    _write(folder, files)
    return True


def project_files() -> dict[str, str]:
    """Path in the project -> content of every file that `lay_out` writes."""
    return {
        "README.md": (_TEMPLATES / "README.md").read_text(encoding="utf-8"),
        ".gitignore": _IGNORED,
        "configs/smoke.yaml": _made_from(
            "stage1/smoke.yaml", _SMOKE,
            {
                "[coordexp/plugin.py]": f"['{PLUGIN_FILE}']   # what `coordexp plugin-path` prints",
                "model: runs/demo/model": "model: models/tiny",
                "[runs/demo/data/train.jsonl]": "[data/shapes/train.jsonl]",
                "[runs/demo/data/val.jsonl]": "[data/shapes/val.jsonl]",
                "output_dir: runs/stage1/smoke": "output_dir: runs/smoke",
            },
        ),
        "configs/stage1.yaml": _made_from(
            "stage1/base.yaml", _STAGE1,
            {
                "model: runs/models/qwen3vl-4b-coord": f"model: models/base-coord{_FILL_IN}",
                "output_dir: runs/stage1/base": "output_dir: runs/stage1",
                **_DATA,
            },
        ),
        "configs/stage2.yaml": _made_from(
            "stage2_two_channel/base.yaml", _STAGE2,
            {
                "model: runs/stage1/base/best ": "model: runs/stage1/best ",
                "output_dir: runs/stage2_two_channel/base": "output_dir: runs/stage2",
                **_DATA,
            },
        ),
    }  # fmt: skip


def _made_from(name: str, head: str, lines: dict[str, str]) -> str:
    """A recipe with another comment at its head and other paths. ContractError where it does not hold one of them."""
    _, _, settings = (configs() / name).read_text(encoding="utf-8").partition("\n\n")
    text = f"{head}\n{settings}"
    for old, new in lines.items():
        if text.count(old) != 1:
            raise ContractError(
                f"{configs() / name}: expected {old!r} once, found it {text.count(old)} times."
            )
        text = text.replace(old, new)
    return text


def _write(folder: Path, files: dict[str, str]) -> None:
    """The hashes that files may have come first, so that the next call finishes one that is cut off."""
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    before = _stamp(folder) or {}
    after = {name: [_hash(text)] for name, text in files.items()}
    write_json(folder / STAMP, {name: [*before.get(name, []), *hashes] for name, hashes in after.items()})
    for name, text in files.items():
        write_text(folder / name, text)
    write_json(folder / STAMP, after)


def _is_up_to_date(folder: Path, files: dict[str, str]) -> bool:
    return _stamp(folder) == {name: [_hash(text)] for name, text in files.items()} and all(
        (folder / name).is_file() for name in files
    )


def _refuse_touched(folder: Path, files: dict[str, str]) -> None:
    known = _stamp(folder)
    if known is None:
        raise ConfigError(f"{folder}: is not empty; name a folder that is new or empty.")
    touched = [
        name
        for name in files
        if (folder / name).exists() and _hash_of(folder / name) not in known.get(name, [])
    ]
    if touched:
        raise ConfigError(
            f"{folder}: holds a project whose {' and '.join(touched)} {'has' if len(touched) == 1 else 'have'} been "
            "changed since; it is left as it is: name a new folder, and copy from there what you want."
        )


def _stamp(folder: Path) -> dict[str, list[str]] | None:
    if not (folder / STAMP).is_file():
        return None
    found = read_json(folder / STAMP, error=ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{folder / STAMP}: is not what `coordexp init` wrote; remove it to start anew elsewhere."
        )
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
