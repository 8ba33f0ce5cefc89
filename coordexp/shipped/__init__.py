"""What comes with the package beside its code: recipes (configs/), runbooks, the plugin that ms-swift loads.

In a checkout recipes and runbooks are the two folders beside the package; a wheel holds them in this folder.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
CONFIGS, RUNBOOKS = "configs", "runbooks"
PLUGIN_FILE = _HERE.parent / "plugin.py"
"""What `external_plugins` of ms-swift has to name."""


def is_installed() -> bool:
    """Whether this is an installed package rather than a checkout."""
    return (_HERE / CONFIGS).is_dir()


def configs() -> Path:
    """The folder of the recipes."""
    return _folder(CONFIGS)


def runbooks() -> Path:
    """The folder of the runbooks."""
    return _folder(RUNBOOKS)


def recipe_file(path: str | Path) -> Path:
    """`path`; for `configs/...` that is not there in the working folder, the recipe of that name that comes along."""
    path = Path(path)
    if path.is_absolute() or path.parts[:1] != (CONFIGS,) or path.exists():
        return path
    ours = configs().joinpath(*path.parts[1:])
    return ours if ours.is_file() else path


def _folder(name: str) -> Path:
    return (_HERE if is_installed() else _HERE.parents[1]) / name
