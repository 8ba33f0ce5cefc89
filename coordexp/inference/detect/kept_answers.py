"""Answers that a folder keeps, so that nothing is asked twice.

    with KeptAnswers.open(folder, settings, overwrite=False) as kept:
        kept.get(picture_hash)                       # None, or what was answered before
        kept.add([(picture_hash, line, trace), ...]) # on the disk afterwards

They are known by the content of their pictures: a picture that was moved is not asked again, one that was changed is.
`detect_run.json` says what the answers are made with: other settings are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.log import differing_settings
from coordexp.files import folder_lock, json_line, read_json, write_json

ANSWERS, RUN_META = "answers.jsonl", "detect_run.json"
_LOCK = ".detect.lock"

Answer = tuple[dict[str, Any], dict[str, Any]]
"""A line of `gt_vs_pred.jsonl` and one of the token trace."""


class KeptAnswers:
    """Answers by the hashes of their pictures.

    path: their file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None, known: Mapping[str, Answer] | None = None) -> None:
        self._path = path
        self._known = dict(known or {})

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool,
        notes: Mapping[str, Any] | None = None,
    ) -> Iterator[KeptAnswers]:
        """Those of a folder; nobody else can write there meanwhile.

        settings: plain values that decide the answers.  notes: kept beside them without being compared.
        overwrite: forget what the folder keeps.

        Raises:
            ConfigError: the folder keeps answers made with other settings (named).
            RecordError: its file is not one of answers.
        """
        path, meta = folder / ANSWERS, folder / RUN_META
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made ({error.strerror}). Give another --save.") from error
        with folder_lock(folder, _LOCK, busy=partial(_refuse, folder)):
            if overwrite:
                path.unlink(missing_ok=True)
            elif meta.is_file():
                _check(folder, read_json(meta), settings)
            elif path.exists():
                raise ConfigError(
                    f"{folder} holds {ANSWERS} but no {RUN_META} that says how they were made; give another --save, or "
                    "--overwrite to start anew."
                )
            write_json(meta, {**settings, **(notes or {})})
            yield cls(path, _read(path) if path.exists() else {})

    def __len__(self) -> int:
        return len(self._known)

    def get(self, picture_hash: str) -> Answer | None:
        """The answer about this picture; None where there is none."""
        return self._known.get(picture_hash)

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """Keep more; they are on the disk afterwards."""
        self._known.update(answers)
        if self._path is None:
            return
        rows = [{"picture_hash": key, "line": line, "trace": trace} for key, (line, trace) in answers]
        with self._path.open("ab") as stream:
            stream.write(b"".join(map(json_line, rows)))
            stream.flush()
            os.fsync(stream.fileno())


def _refuse(folder: Path) -> None:
    raise ConfigError(f"{folder}: another process is writing there; wait for it, or give another --save.")


def _check(folder: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    differing = differing_settings(recorded, settings)
    if differing:
        raise ConfigError(
            f"{folder} keeps answers made with other settings ({'; '.join(differing)}); give another --save, or "
            "--overwrite to start anew."
        )


def _read(path: Path) -> dict[str, Answer]:
    """Whole lines; what a stopped run left behind the last of them is cut off."""
    known: dict[str, Answer] = {}
    end = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.endswith(b"\n"):
                break
            try:
                row = json.loads(raw)
                known[row["picture_hash"]] = row["line"], row["trace"]
            except (ValueError, KeyError, TypeError) as error:
                if not stream.read(1):  # torn by a crash of the machine: the end was never written
                    break
                raise RecordError(
                    f"{path}:{number}: not a line of `coordexp detect` ({error}); --overwrite starts anew."
                ) from None
            end += len(raw)
    os.truncate(path, end)
    return known
