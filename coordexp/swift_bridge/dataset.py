"""Serve rows of our JSONL contract through ms-swift's dataset machinery (sampling, splitting, shuffling, sharding)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from swift.dataset import DatasetMeta, register_dataset
from swift.dataset.dataset_meta import BaseDatasetLoader
from swift.dataset.dataset_syntax import DatasetSyntax

from coordexp.errors import ConfigError

ReadRows = Callable[[str], Dataset]


def jsonl_path(dataset: str) -> str | None:
    """The local `.jsonl` file behind one `--dataset` value (a `#N` sampling suffix removed), or None."""
    syntax = DatasetSyntax.parse(dataset)
    return syntax.dataset if syntax.dataset_type == "path" and syntax.dataset.endswith(".jsonl") else None


def register_jsonl(datasets: Sequence[str], read_rows: ReadRows) -> None:
    """Open every local `.jsonl` of `datasets` with `read_rows(path)` now, and serve those rows for its path.

    read_rows: returns rows of `messages` and `images`; its errors reach the caller before anything is started.

    Raises:
        ConfigError: a dataset is not a local `.jsonl` file.
    """
    for dataset in datasets:
        path = jsonl_path(dataset)
        if path is None:
            raise ConfigError(
                f"dataset {dataset!r} is not an existing .jsonl file; expected a file of one object per line with "
                "images, width, height and objects (runbooks/prepare_data.md)."
            )
        meta = DatasetMeta(dataset_path=path, dataset_name=path, loader=_loader(read_rows(path)))
        register_dataset(meta, exist_ok=True)


def _loader(rows: Dataset) -> type[BaseDatasetLoader]:
    class CoordJsonlLoader(BaseDatasetLoader):
        """Hands over the rows; ms-swift does everything after that."""

        def __init__(self, *, streaming: bool = False, **_options: Any) -> None:
            if streaming:
                raise ConfigError(
                    "streaming: true has no use for coordexp JSONL files: they are checked as a whole once, and mapped "
                    "from the disk, never held in memory. Remove the flag."
                )

        def load(
            self, dataset_syntax: DatasetSyntax, dataset_meta: DatasetMeta, *, use_hf: bool | None = None
        ) -> Dataset:
            return rows

    return CoordJsonlLoader
