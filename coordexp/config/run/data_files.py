"""The data files that `custom` names: patterns written out, in the order in which they are read."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from coordexp.config.schema.fusion import Fusion

DATA_ARGUMENTS = ("dataset", "val_dataset")


def from_home(paths: Sequence[str]) -> list[str]:
    """With the home folder in the place of a leading `~`, which ms-swift looks for as it is written."""
    return [os.path.expanduser(path) for path in paths]


def expanded(patterns: Sequence[str]) -> list[str]:
    """The files of paths and patterns, each once; those of a pattern by name, a leading `~` written out.

    A pattern that matches nothing stays as it is, so that it can be named as missing.
    """
    found: dict[str, None] = {}
    for pattern in from_home(patterns):
        is_pattern = glob.has_magic(pattern) and not os.path.exists(pattern)
        found |= dict.fromkeys(
            (sorted(glob.glob(pattern, recursive=True)) if is_pattern else []) or [pattern]
        )
    return list(found)


def files_of_mixture(fusion: Fusion, *, validation: bool) -> list[str]:
    """All training or validation files, source by source."""
    of_sources = files_of_sources(fusion, validation=validation)
    return [file for files in of_sources.values() for file in files]


def files_of_sources(fusion: Fusion, *, validation: bool) -> dict[str, list[str]]:
    """Name of a source -> its files; sources without validation files are left out there."""
    listed = {
        source.name: (source.val_jsonl if validation else source.train_jsonl) for source in fusion.sources
    }
    return {name: expanded(patterns) for name, patterns in listed.items() if patterns}
