"""The section of performance.md that tools/bench/gpu.py writes: what it says, and what never gets there."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
from support.processes import ROOT

FOUND: dict[str, Any] = {
    "kind": "cuda", "small": False, "device": "A GPU, CUDA 13.0", "date": "2026-01-02",
    "versions": {"torch": "2.13.0", "vllm": "not installed"},
    "parts": [
        {"part": "Head", "rows": [{
            "what": "fused, T 12288", "found": "50.0 ms, 700 MiB", "against": "usual",
            "baseline": "200.0 ms, 28000 MiB",
            "ratios": {"time": 0.25, "memory": 0.025},
        }]},
        {"part": "Rollouts", "rows": [{"left_out": "needs vLLM"}]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "tools" / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_the_section_is_made_anew_between_its_markers(bench: Any):
    page = f"# Title\n\n{bench.BEGIN}\nold figures\n{bench.END}\n\nrest\n"
    written = bench.with_section(page, FOUND)
    assert written.startswith(
        f"# Title\n\n{bench.BEGIN}\nA GPU, CUDA 13.0; torch 2.13.0, vllm not installed; 2026-01-02.\n"
    )
    ratios = "0.25 of the time, 0.025 of the memory"
    assert (
        f"\n| Head | fused, T 12288: 50.0 ms, 700 MiB | usual | 200.0 ms, 28000 MiB | {ratios} |\n" in written
    )
    assert "| Rollouts | left out: needs vLLM | | | |" in written
    assert "old figures" not in written
    assert written.endswith(f"{bench.END}\n\nrest\n")
    assert bench.with_section(written, FOUND) == written


@pytest.mark.parametrize("other", [{"kind": "cpu"}, {"small": True}])
def test_figures_of_a_cpu_or_of_tiny_sizes_are_not_written(bench: Any, other: dict[str, Any]):
    with pytest.raises(SystemExit, match="the page holds those of a GPU at full size"):
        bench.with_section(f"{bench.BEGIN}{bench.END}", FOUND | other)


def test_the_page_has_the_markers(bench: Any):
    page = (ROOT / "runbooks" / "performance.md").read_text(encoding="utf-8")
    assert bench.with_section(page, FOUND).count("A GPU, CUDA 13.0") == 1


def test_a_part_whose_package_is_missing_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(bench.MODULES, "vLLM", "no_such_package")
    part = next(part for part in bench.PARTS if "vLLM" in part.needs)
    found = bench.measure(part, device="cuda", small=False, most_s=1.0)
    assert found["rows"] == [{"left_out": "needs vLLM"}]
