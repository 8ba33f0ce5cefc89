"""The bench of data files runs on today's code, on data that mean the same to all of its ways, and knows its bounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from coordexp.codec.records import read_jsonl

PROGRAM = Path(__file__).parents[3] / "tools" / "bench" / "bench_data.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_data", PROGRAM)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_way_opens_the_data(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COORDEXP_CACHE", str(tmp_path / "cache"))
    data = bench.write_data(tmp_path, 12, 3)
    records = read_jsonl(data, require_images=True)
    assert [len(record.objects) for record in records] == [7] * 12
    found = {}
    for kind, open_data in bench.KINDS.items():
        meter = open_data(str(data))
        found[kind] = {name: getattr(meter, name) for name in ("wall_s", "cpu_s", "unique_mb", "resident_mb")}
        assert meter.wall_s > 0
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_what_misses_its_bound_is_said(bench, capsys: pytest.CaptureFixture[str]):
    fine = {"wall_s": 1.0, "cpu_s": 1.0, "unique_mb": 10.0, "resident_mb": 20.0}
    found = {kind: dict(fine) for kind in bench.KINDS}
    assert bench.report(found, num_records=10_000, cores=2) == []
    assert "0.100    0.200" in capsys.readouterr().out  # ms of CPU, and of wall times cores, a record
    found["first start"]["cpu_s"], found["second start"]["wall_s"] = 2.6, 2.1
    found["a further process"]["unique_mb"] = 61.0
    assert bench.report(found, num_records=10_000, cores=2) == [
        "the first start takes more than 0.25 ms of CPU a record",
        "the second start takes more than 2.0 s",
        "a further process needs more than 60.0 MB of its own",
    ]
