"""Write a directory completely or not at all, and know what an existing one was made from.

A generated directory carries a small JSON *stamp* of the parameters that made it. Asking again for the
same parameters is then a cheap "up to date"; asking for others is an error instead of a silent mixture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError
from coordexp.files import atomic_folder, read_json, write_json


@contextmanager
def staged_directory(output_dir: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `output_dir` when the block ends without error.

    On an error the temporary directory is removed and `output_dir` is left as it was. An existing
    `output_dir` may be empty; a filled one needs `replace=True` and disappears only after the new
    directory is complete.

    Raises:
        ConfigError: `output_dir` is a file, or a filled directory while `replace` is False.
    """
    output_dir = Path(output_dir)
    _check_destination(output_dir, replace=replace)
    with atomic_folder(output_dir, replace=replace) as staging_dir:
        yield staging_dir


def write_stamp(directory: Path, name: str, parameters: Mapping[str, Any]) -> None:
    """Write `parameters` as `directory/name` in a canonical JSON form."""
    write_json(directory / name, parameters, sort_keys=True)


def is_up_to_date(directory: Path, name: str, parameters: Mapping[str, Any]) -> bool:
    """True if `directory` was made from exactly these parameters, False if there is nothing there yet.

    Raises:
        ConfigError: `directory` was made from other parameters; the message lists each difference.
    """
    stamp_path = Path(directory) / name
    if not stamp_path.is_file():
        return False
    found = read_json(stamp_path, error=ConfigError)
    wanted = json.loads(json.dumps(parameters))
    if found == wanted:
        return True
    differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    changes = "; ".join(
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked for" for key in differing
    )
    raise ConfigError(
        f"{directory}: already holds something made from other parameters ({changes}). "
        "Choose another --output, or pass --force to replace it."
    )


def _check_destination(output_dir: Path, *, replace: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(
            f"{output_dir}: is a file, expected a directory to create. Choose another --output."
        )
    if output_dir.is_dir() and any(output_dir.iterdir()) and not replace:
        raise ConfigError(
            f"{output_dir}: directory exists and is not empty. Choose another --output, "
            "or remove what is there first."
        )
