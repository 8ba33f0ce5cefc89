"""metrics.jsonl and stats.json: first record, one payload a line, torn lines, replacement."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

import coordexp
from coordexp.errors import ContractError
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink, read_payloads, write_stats


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_meta_first_then_one_payload_a_line(tmp_path: Path) -> None:
    files = MetricsSink(tmp_path / "run", meta={"config_hash": "abc", "world_size": 2})
    payloads = [build_payload("train", step, {"loss": 1.0 / step}) for step in (1, 2, 3)]
    for payload in payloads:
        files.write(payload)
    meta, *written = lines(files.metrics_path)
    assert (meta["record"], meta["schema_version"], meta["config_hash"], meta["world_size"]) == (
        "run_meta",
        1,
        "abc",
        2,
    )
    assert meta["versions"]["python"] == platform.python_version()
    assert meta["versions"]["coordexp"] == coordexp.__version__
    assert written == payloads
    for payload in payloads[:2]:
        write_stats(files.run_dir, payload)
    assert json.loads((files.run_dir / "stats.json").read_text()) == payloads[1]
    assert sorted(path.name for path in files.run_dir.iterdir()) == ["metrics.jsonl", "stats.json"]


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    MetricsSink(tmp_path, meta={"config_hash": "a"}).write(build_payload("train", 1, {"loss": 1.0}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "mode": "tr')  # killed in the middle of a write
    MetricsSink(tmp_path, meta={"config_hash": "b"}).write(build_payload("train", 2, {"loss": 0.5}))
    assert [payload["global_step"] for payload in read_payloads(tmp_path / "metrics.jsonl")] == [1, 2]


def test_an_invalid_payload_writes_nothing(tmp_path: Path) -> None:
    files = MetricsSink(tmp_path, meta={"config_hash": "a"})
    with pytest.raises(ContractError, match="schema_version"):
        files.write({"mode": "train", "global_step": 1, "metrics": {}})
    assert len(lines(files.metrics_path)) == 1


def test_reading_names_the_line_of_a_payload_that_is_not_valid(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"record": "run_meta"}\n{"schema_version": 3, "mode": "train", "global_step": 1, "metrics": {}}\n'
    )
    with pytest.raises(ContractError, match=r"metrics\.jsonl:2: .*schema_version 3 is not supported"):
        list(read_payloads(path))


def test_run_meta_needs_the_config_hash(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="config_hash is missing"):
        MetricsSink(tmp_path, meta={"variant": "stage1_coord"})
