"""The two files of an inference run while it is being written, so that a run that was stopped can go on.

    with PredictionLog.open(output, settings, num_images=500, chunk_size=16, overwrite=False) as log:
        ...                                        # answer the images from log.num_done on
        log.append(lines, traces)                  # once per chunk
        log.finish()

Lines go to `*.partial` files and reach the disk once per chunk; the files get their names when the last image is done.
A run killed at any moment loses the chunk it was in, and the next one starts at a chunk boundary, so that it
answers in the same batches as a run that was never stopped. `infer_run.json` says what the run is made with:
other settings are refused.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import (
    BAD_PICTURE,
    DISTRIBUTIONS,
    GT_VS_PRED,
    RUN_META,
    SCORED,
    TOKEN_TRACE,
    read_jsonl_lines,
)
from coordexp.files import folder_lock, json_line, read_json, write_json

PARTIAL = ".partial"
_FILES = (TOKEN_TRACE, GT_VS_PRED)  # in the order they are written and renamed
_LOCK = ".infer.lock"
_BEFORE = {"decoding.repetition_penalty": 1.0, "decoding.guided": False}
"""What runs that do not name a setting were made with, where that is not nothing."""


class PredictionLog:
    """Appends to the files of one run.

    num_done: images whose lines are on disk.
    num_cut, num_bad: of a finished run, answers that were cut at the limit of their length, and pictures that could
        not be used; also in `infer_run.json`.
    """

    def __init__(self, directory: Path, num_images: int, num_done: int) -> None:
        self.directory = directory
        self.num_images = num_images
        self.num_done = num_done
        self.num_cut = self.num_bad = 0
        self._streams: list[IO[bytes]] = []

    @classmethod
    @contextmanager
    def open(
        cls,
        directory: Path,
        settings: Mapping[str, Any],
        *,
        num_images: int,
        chunk_size: int,
        overwrite: bool,
        notes: Mapping[str, Any] | None = None,
    ) -> Iterator[PredictionLog]:
        """The log of a run in `directory`, new or continued; nobody else can write there meanwhile.

        settings: plain values that decide what the predictions are; a run with other ones is not continued.
        notes: kept beside them without being compared.  overwrite: remove what stands there and start anew.

        Raises:
            ConfigError: the folder holds predictions made with other settings (named), or of an unknown run.
            RecordError: the files there are not what an interrupted run leaves.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with folder_lock(directory, _LOCK, busy=partial(_refuse, directory)):
            if overwrite:
                _remove(directory)
            else:
                _check_settings(directory, settings)
            num_done = _recover(directory, num_images, chunk_size)
            write_json(directory / RUN_META, {**settings, **(notes or {})})
            log = cls(directory, num_images, num_done)
            try:
                yield log
            finally:
                log.close()

    def append(self, lines: Sequence[Mapping[str, Any]], traces: Sequence[Mapping[str, Any]]) -> None:
        """Add the lines of the next images; they are on disk afterwards."""
        if not self._streams:
            self._streams = [_partial(self.directory, name).open("ab") for name in _FILES]
        for stream, rows in zip(self._streams, (traces, lines), strict=True):
            stream.write(b"".join(map(json_line, rows)))
            stream.flush()
            os.fsync(stream.fileno())
        self.num_done += len(lines)

    def finish(self) -> None:
        """Give the files their names; RecordError while an image is missing."""
        if self.num_done != self.num_images:
            raise RecordError(
                f"{self.directory}: {self.num_done} of {self.num_images} images are done; the run is not complete."
            )
        self.close()
        for name in _FILES:
            partial = _partial(self.directory, name)
            if not self.num_images:
                partial.touch()
            if partial.exists():
                partial.replace(self.directory / name)
        reasons = _finish_reasons(self.directory / TOKEN_TRACE)
        self.num_cut, self.num_bad = reasons["length"], reasons[BAD_PICTURE]
        counts = {"num_cut_at_max_new_tokens": self.num_cut, "num_bad_pictures": self.num_bad}
        if any(counts.values()):
            meta = self.directory / RUN_META
            write_json(meta, {**read_json(meta), **{key: count for key, count in counts.items() if count}})

    def close(self) -> None:
        """Close the files, leaving them as they are."""
        for stream in self._streams:
            stream.close()
        self._streams = []


def _refuse(directory: Path) -> None:
    raise ConfigError(
        f"{directory}: another process is writing predictions there; wait for it, or give another --output."
    )


def _check_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError unless the folder is empty of predictions, or holds some made with the same settings."""
    meta = directory / RUN_META
    if not meta.is_file():
        found = [path.name for path in _all_files(directory) if path.exists()]
        if found:
            raise ConfigError(
                f"{directory} holds {', '.join(found)} but no {RUN_META} that says how they were made; give another "
                "--output, or --overwrite to start anew."
            )
        return
    differing = differing_settings(read_json(meta), settings)
    if differing:
        raise ConfigError(
            f"{directory} holds predictions made with other settings ({'; '.join(differing)}); give another --output, "
            "or --overwrite to start anew."
        )


def differing_settings(recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What is set otherwise than in a run's record, by dotted name with both values."""
    old, new = _flat(recorded), _flat(settings)
    return [
        f"{key}: {_shown(old.get(key))} there, {_shown(new.get(key))} now"
        for key in new
        if old.get(key, _BEFORE.get(key)) != new[key]
    ]


def _recover(directory: Path, num_images: int, chunk_size: int) -> int:
    """Images whose lines are complete in both files; everything behind the last full chunk is cut off.

    When every image is there, nothing is cut.
    """
    paths = [_present(directory, name) for name in _FILES]
    ends = [_line_ends(path) if path is not None else [] for path in paths]
    num_done = min(map(len, ends))
    if num_done > num_images:
        raise RecordError(f"{directory}: {num_done} images are done, but the data has only {num_images}.")
    if num_done < num_images:
        num_done -= num_done % chunk_size
    for name, path, found in zip(_FILES, paths, ends, strict=True):
        if path is None or (len(found) == num_done and path == directory / name):
            continue
        path = path.replace(_partial(directory, name))
        os.truncate(path, found[num_done - 1] if num_done else 0)
    return num_done


def _line_ends(path: Path) -> list[int]:
    """Byte offsets just after every complete line; a torn line at the end of the file is left out.

    Raises RecordError for a broken line before the last, or one that is not of the next image.
    """
    ends: list[int] = []
    with path.open("rb") as stream:
        for raw in stream:
            if not raw.endswith(b"\n"):
                break
            try:
                image_id = json.loads(raw)["image_id"]
            except (ValueError, KeyError, TypeError) as error:
                if not stream.read(1):  # torn by a crash of the machine: the end was never written
                    break
                raise RecordError(
                    f"{path}:{len(ends) + 1}: not a line of `coordexp infer` ({error})."
                ) from None
            if image_id != len(ends):
                raise RecordError(
                    f"{path}:{len(ends) + 1}: image_id is {image_id!r}, expected {len(ends)}; the file was changed. "
                    "--overwrite starts anew."
                )
            ends.append((ends[-1] if ends else 0) + len(raw))
    return ends


def _finish_reasons(trace: Path) -> Counter[str]:
    """How the answers of a token trace ended, with their numbers."""
    return Counter(str(row.get("finish_reason")) for row in read_jsonl_lines(trace, ("image_id",)))


def _present(directory: Path, name: str) -> Path | None:
    """The partial file, or the finished one, or neither."""
    return next((path for path in (_partial(directory, name), directory / name) if path.exists()), None)


def _partial(directory: Path, name: str) -> Path:
    return directory / f"{name}{PARTIAL}"


def _all_files(directory: Path) -> list[Path]:
    return [path for name in _FILES for path in (directory / name, _partial(directory, name))]


def _remove(directory: Path) -> None:
    """Everything of an earlier run, settings last: a half-removed run is still known for what it was."""
    for path in (directory / SCORED, directory / DISTRIBUTIONS, *_all_files(directory), directory / RUN_META):
        path.unlink(missing_ok=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}…"
