"""Every file the package writes: complete under its name or not there at all; JSON and JSON Lines in one strict form.

    with atomic_file(path) as stream:                 # text; atomic_file(path, "wb") for bytes
        stream.write(page)
    write_json(path, {"AP": 0.4}); read_json(path)
    write_jsonl(path, rows); append_jsonl(log, row)
    for number, row in read_jsonl(path): ...
    with atomic_folder(folder, replace=True) as unfinished: ...

A writer works under a hidden name of its own in the same folder and renames it when done, so that a reader, a second
writer or a crash never meets half a file. JSON is UTF-8 with characters kept as they are, and holds no NaN.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import orjson

from coordexp.errors import ConfigError, ContractError, CoordExpError, RecordError

_TAIL_WIDTH = 500
_UPLOADED: list[Path] = []


@contextmanager
def atomic_file(path: str | Path, mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """A stream whose content becomes `path` when the block ends without error; otherwise nothing changes.

    mode: "w" for UTF-8 text with line ends as written, "wb" for bytes.  sync: wait until it is on the disk, so that
    it outlives a crash of the machine; leave it out for what is written every few seconds.
    Folders above are made. Raises ConfigError when the folder cannot be written to.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = unfinished.open(mode.replace("w", "x"), **text)  # type: ignore[call-overload]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    try:
        with stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if sync:
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends without error; otherwise it is removed.

    An empty folder at `path` makes way; a filled one only with `replace`, and only when the new one is complete.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if replace and path.is_dir():
            retired = _unfinished(path)
            path.rename(retired)
            unfinished.rename(path)
            shutil.rmtree(retired)
        else:
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def while_uploaded(folder: str | Path) -> None:
    """From now on this process keeps what is unfinished under `folder` out of uploads of `folder`.

    Such a file then lies in `folder` itself under a name that begins with `_`, which the HF Trainer's uploads leave
    out. An upload lists the folder first and reads its files later: it fails over a name that is gone by then.
    """
    resolved = Path(folder).resolve()
    if resolved not in _UPLOADED:
        _UPLOADED.append(resolved)


@contextmanager
def folder_lock(folder: str | Path, name: str, *, busy: Callable[[], object]) -> Iterator[int]:
    """A lock on `folder` until the block ends, which the system takes back when the process ends, however it ends.

    busy: called while another process has it; it raises to give up, or returns to wait.

    Yields the descriptor of the file `name` that holds it; a process that inherits it keeps the lock while it runs.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(folder) / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def log_tail(path: str | Path, lines: int = 25) -> str:
    """The last lines of a process's log, without what progress bars wrote over, long ones cut."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    shown = [line for line in (whole.rsplit("\r", 1)[-1].rstrip() for whole in text.split("\n")) if line]
    return "\n".join(
        line if len(line) <= _TAIL_WIDTH else line[:_TAIL_WIDTH] + " ..." for line in shown[-lines:]
    )


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False too for names that no file system takes."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; False too for names that no file system takes."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def atomic_link(path: str | Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, in one step where there is one already."""
    unfinished = _unfinished(Path(path))
    unfinished.symlink_to(target)
    try:
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, *, sync: bool = True) -> None:
    """Make `text` the content of `path`."""
    with atomic_file(path, sync=sync) as stream:
        stream.write(text)


def write_json(
    path: str | Path,
    value: Any,
    *,
    indent: int | None = 2,
    sort_keys: bool = False,
    default: Callable[[Any], Any] | None = None,
    sync: bool = True,
) -> None:
    """Make one JSON value the content of `path`.

    indent: None puts it on one line.  default: what to write for values that JSON does not have.
    Raises ContractError for a number that is not finite or a value that JSON does not have.
    """
    content = _json_bytes(path, value, indent=indent, sort_keys=sort_keys, default=default)
    with atomic_file(path, "wb", sync=sync) as stream:
        stream.write(content)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Make one JSON value per line the content of `path`. Raises as `write_json`."""
    with atomic_file(path, "wb") as stream:
        for row in rows:
            stream.write(_json_bytes(path, row))


def write_large_json(path: str | Path, value: Any) -> None:
    """As `write_json` on one line, several times faster, for values whose numbers are known to be finite.

    (The encoder writes null for a number that is not.) Whole numbers of more than 64 bits take the slower way.
    """
    try:
        content = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:
        content = _json_bytes(path, value)
    with atomic_file(path, "wb") as stream:
        stream.write(content)


def append_jsonl(path: str | Path, row: Any) -> None:
    """Append one JSON line in a single write: a reader never sees half of it, a crash costs this line alone."""
    content = _json_bytes(path, row)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def json_line(row: Any) -> bytes:
    """A JSON value as the line that `write_jsonl` writes."""
    return _json_bytes("a line", row)


def read_json(path: str | Path, *, error: type[CoordExpError] = RecordError, allow_nan: bool = False) -> Any:
    """The JSON value in a file, with or without a byte order mark.

    allow_nan: let NaN and Infinity pass, for a reader that checks every number and names the entry of a bad one.
    Raises `error` naming file, line and reason when it cannot be read or is not strict JSON, also for an object that
    holds a key twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}).") from problem
    return _parsed(content, f"{path}", error, allow_nan=allow_nan)


def read_jsonl(
    path: str | Path,
    *,
    error: type[CoordExpError] = RecordError,
    allow_nan: bool = False,
    skip_broken: bool = False,
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line. Lines end at a newline only: other separators stand in strings.

    allow_nan: as in `read_json`; a whole number beyond 64 bits becomes a float.
    skip_broken: leave out lines that are not JSON, as a crash leaves them.
    Raises `error` naming file and line otherwise, and when the file cannot be read.
    """
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    value = _parsed(line, f"{path}:{number}", error, is_line=True, allow_nan=allow_nan)
                except error:
                    if skip_broken:
                        continue
                    raise
                yield number, value
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}).") from problem


def _unfinished(path: Path) -> Path:
    """A name near `path` that no other process, thread or machine uses: hidden beside it, or apart from an upload."""
    name = f"{path.name[:200]}.{uuid.uuid4().hex[:12]}"
    parent = path.parent.resolve()
    for folder in _UPLOADED:
        if parent.is_relative_to(folder):
            return folder / f"_{name}"
    return path.with_name(f".{name}")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(path: str | Path, value: Any, **options: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
        try:
            return f"{text}\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 does not have
            return f"{json.dumps(value, allow_nan=False, **options)}\n".encode()
    except (TypeError, ValueError) as error:
        raise ContractError(f"{path}: cannot be written as JSON ({error}).") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dict. Of a key that is written twice readers keep one value and lose the other in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {repeated[:80]!r} stands in one object twice")
    return found


def _parsed(
    content: bytes,
    where: str,
    error: type[CoordExpError],
    *,
    is_line: bool = False,
    allow_nan: bool = False,
) -> Any:
    if is_line:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            pass  # or what the standard library reads (a byte order mark, NaN, half a surrogate) or explains better
    try:
        text = content.decode("utf-8-sig")
        return json.loads(
            text,
            parse_constant=None if allow_nan else _refuse_constant,
            object_pairs_hook=None if is_line else _without_repeats,
        )
    except UnicodeDecodeError as problem:
        raise error(f"{where}: is not UTF-8 ({problem.reason} at byte {problem.start}).") from problem
    except json.JSONDecodeError as problem:
        line = "" if is_line else f":{problem.lineno}"
        raise error(f"{where}{line}: not valid JSON ({problem.msg} at column {problem.colno}).") from problem
    except RecursionError as problem:
        raise error(f"{where}: is nested too deeply to be read.") from problem
    except ValueError as problem:
        raise error(f"{where}: not valid JSON ({problem}).") from problem
