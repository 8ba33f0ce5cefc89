"""Open the records of a data file: checked and written by the first process that asks, mapped by all others.

    ~/.cache/coordexp/records/<name of the file>-<hash of its path>/<fingerprint>/
        records.arrow    columns of `coordexp.data.store.columns`
        facts.json       what was read, and when

The fingerprint covers path, size and time of the file and the code that checks it. `COORDEXP_CACHE` names another
folder than ~/.cache/coordexp. Pictures are looked at when a file is checked, not again at later starts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from coordexp import pictures
from coordexp.codec import coord_vocab, records, schema
from coordexp.data.store import check, columns
from coordexp.data.store.check import batches_in, checked_chunks, usable_cores
from coordexp.data.store.columns import SCHEMA
from coordexp.data.store.locks import one_at_a_time
from coordexp.data.store.place import cache_folder
from coordexp.errors import RecordError
from coordexp.files import atomic_folder, read_json, write_json

logger = logging.getLogger(__name__)

ARROW_FILE, FACTS_FILE = "records.arrow", "facts.json"
KEEP_UNUSED_S = 30 * 86400.0
"""Tables of earlier versions of a data file are removed when nobody has opened them for so long."""
_CHECKING_CODE = (records, schema, coord_vocab, pictures, check, columns)


@dataclass(frozen=True)
class RecordStore:
    """table: the records, memory-mapped; columns of `SCHEMA`.  datasets: data set -> number of its records.

    folder: where the table lies; other things about the same records may be kept there.
    """

    table: Dataset
    datasets: Mapping[str, int]
    folder: Path


def open_records(path: str | Path, *, cores: int | None = None) -> RecordStore:
    """The records of a JSONL file.

    The first process that opens a file checks it as a whole, pictures included, with all `cores`; others wait for it.

    Raises:
        RecordError: naming file and line: the first record that breaks the contract, a picture that is missing or of
            another size; or the file cannot be read, holds no record, or changes while it is read.
    """
    file = Path(os.path.abspath(path))
    place = _place(file)
    folder = place / _fingerprint(file)
    if not (folder / FACTS_FILE).is_file():
        with one_at_a_time(place / "lock", str(file)):
            if not (folder / FACTS_FILE).is_file():
                _write(file, folder, cores)
                _remove_unused(place, keep=folder)
    with suppress(PermissionError):  # another user's
        os.utime(folder)
    facts = read_json(folder / FACTS_FILE)
    return RecordStore(Dataset.from_file(str(folder / ARROW_FILE)), facts["datasets"], folder)


def _place(file: Path) -> Path:
    """The folder of everything that is kept about a data file."""
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
    return cache_folder() / "records" / f"{file.name[:60]}-{digest}"


def _fingerprint(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError as error:
        raise RecordError(
            f"{file}: cannot be read ({error.strerror}). Check the path of the data file"
        ) from error
    what = [str(file), stat.st_size, stat.st_mtime_ns, _code_hash()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


@lru_cache
def _code_hash() -> str:
    """Of the modules that decide what a good record is, and how it is kept."""
    digest = hashlib.sha256()
    for module in _CHECKING_CODE:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _write(file: Path, folder: Path, cores: int | None) -> None:
    started, before = time.perf_counter(), _fingerprint(file)
    datasets: Counter[str] = Counter()
    with atomic_folder(folder, replace=True) as unfinished:
        with pa.OSFile(str(unfinished / ARROW_FILE), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for checked in checked_chunks(file, cores=cores):
                datasets.update(checked.datasets)
                for batch in batches_in(checked):
                    writer.write_batch(batch)
        if not datasets:
            raise RecordError(f"{file}: holds no record; expected one JSON object per line.")
        if _fingerprint(file) != before:
            raise RecordError(f"{file}: changed while it was read. Start again when it is complete.")
        seconds = time.perf_counter() - started
        facts = {
            "file": str(file),
            "num_records": datasets.total(),
            "datasets": dict(sorted(datasets.items())),
            "checked_at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "checked_by": os.getpid(),
            "seconds": round(seconds, 3),
        }
        write_json(unfinished / FACTS_FILE, facts)
    logger.info(
        "%s: %d records checked in %.1f s with up to %d processes; kept in %s",
        file,
        datasets.total(),
        seconds,
        cores or usable_cores(),
        folder,
    )


def _remove_unused(place: Path, *, keep: Path) -> None:
    for folder in place.iterdir():
        if folder.is_dir() and folder != keep and time.time() - folder.stat().st_mtime > KEEP_UNUSED_S:
            shutil.rmtree(folder, ignore_errors=True)
