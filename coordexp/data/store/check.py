"""Read and check a data file with all cores, in its own order and without ever holding it as a whole."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from coordexp.codec.records import Record, check_images, dataset_name, parse_line
from coordexp.data.store.columns import SCHEMA, batch_of
from coordexp.errors import RecordError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2 * 1024 * 1024
"""Of the data file, checked at a time by one process."""
_BLOCK_BYTES = 1024 * 1024
_LOG_EVERY = 100_000


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file. start, stop: bytes.  first_line: from 1."""

    file: str
    start: int
    stop: int
    first_line: int


@dataclass
class Checked:
    """What a chunk, or a file, holds. batches: Arrow IPC streams of record batches."""

    datasets: Counter[str] = field(default_factory=Counter)
    batch: bytes = b""

    @property
    def num_records(self) -> int:
        return self.datasets.total()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The lines of a file in chunks of about `chunk_bytes`. Raises RecordError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            start, position, first_line, num_lines = 0, 0, 1, 0
            while block := stream.read(min(_BLOCK_BYTES, chunk_bytes)):
                end_of_lines = block.rfind(b"\n") + 1
                if position + end_of_lines - start >= chunk_bytes and end_of_lines:
                    stop = position + end_of_lines
                    yield Chunk(str(path), start, stop, first_line)
                    first_line += num_lines + block.count(b"\n")
                    start, num_lines = stop, 0
                else:
                    num_lines += block.count(b"\n")
                position += len(block)
            if position > start:
                yield Chunk(str(path), start, position, first_line)
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be read ({error.strerror}). Check the path of the data file"
        ) from error


def check_chunk(chunk: Chunk) -> Checked:
    """Check every record of a chunk, and that its pictures are there with the size it states.

    Raises RecordError for the first that breaks the contract.
    """
    records: list[Record] = []
    names: list[str] = []
    with open(chunk.file, "rb") as stream:
        stream.seek(chunk.start)
        lines = io.BytesIO(stream.read(chunk.stop - chunk.start))
    for line, raw in enumerate(lines, start=chunk.first_line):
        record = parse_line(raw, file=chunk.file, line=line)
        if record is not None:
            check_images(record)
            records.append(record)
            names.append(dataset_name(record))
    return Checked(Counter(names), _ipc_bytes(batch_of(records, names)))


def checked_chunks(path: Path, *, cores: int | None = None) -> Iterator[Checked]:
    """`check_chunk` of all chunks of a file, in its order.

    cores: processes that work at the same time; None takes all that may be used.
    Raises RecordError for the first line of the file that breaks the contract.
    """
    chunks = list(chunks_of(path))
    workers = min(cores or usable_cores(), len(chunks))
    if workers <= 1:
        yield from map(check_chunk, chunks)
        return
    # Forked: a fresh interpreter would import the program that runs this, and with it torch and swift.
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context)
    num_records = 0
    try:
        for checked in executor.map(check_chunk, chunks):
            if num_records // _LOG_EVERY < (num_records + checked.num_records) // _LOG_EVERY:
                logger.info("%s: %d records checked", path, num_records + checked.num_records)
            num_records += checked.num_records
            yield checked
    finally:
        executor.shutdown(cancel_futures=True)


def _ipc_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def batches_in(checked: Checked) -> Iterator[pa.RecordBatch]:
    """The record batches that a chunk was turned into."""
    yield from pa.ipc.open_stream(checked.batch)
