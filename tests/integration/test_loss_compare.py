"""tools/loss_compare.py on real two-step trainings of a nano model: the plain and the fused head give one curve."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT

from coordexp.errors import CoordExpError

TOOL = ROOT / "tools" / "loss_compare.py"


@pytest.fixture(scope="module")
def loss_compare():
    spec = importlib.util.spec_from_file_location("loss_compare", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_compare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(
        f"""
model: {{model: {nano_model}, model_type: qwen3_vl, torch_dtype: float32, attn_impl: sdpa}}
data: {{max_length: 512, strict: true, load_from_cache_file: false}}
tuner: {{tuner_type: full, freeze_vit: false, freeze_aligner: false}}
training:
  output_dir: {file.parent / "never_used"}
  max_steps: 100
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  lr_scheduler_type: constant
  gradient_checkpointing: false
  use_cpu: true
  fp16: false
  bf16: false
  check_model: false
custom:
  trainer_variant: stage1_coord
  train_jsonl: {scenes / "train.jsonl"}
  coord_soft_ce_w1: {{ce_weight: 1.0, gate_weight: 1.0}}
"""
    )
    return file


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env |= {"ACCELERATE_USE_CPU": "true", "COORDEXP_STRICT_METRICS": "1"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=300
    )


@pytest.mark.slow
def test_plain_and_fused_head_train_alike(loss_compare, config: Path, tmp_path: Path):
    done = run_tool(
        config, config, "--max-steps", 2, "--set-a", "custom.head=plain", "--set-b", "custom.head=fused",
        "--keep", tmp_path / "runs",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    curves = {}
    for name, head in (("a", "plain"), ("b", "fused")):
        resolved = json.loads((tmp_path / "runs" / name / "resolved_config.json").read_text())
        assert head in json.dumps(resolved["custom"]["head"])
        curves[name] = loss_compare.read_curve(tmp_path / "runs" / name)
        assert list(curves[name]) == [1, 2]
    assert curves["a"][2] < curves["a"][1]
    for line, step in zip(done.stdout.splitlines()[1:3], (1, 2), strict=True):
        shown = [float(word) for word in line.split()]
        assert shown[:3] == pytest.approx([step, curves["a"][step], curves["b"][step]], abs=1e-8)


def test_differences_by_hand(loss_compare, capsys: pytest.CaptureFixture[str]):
    rows = loss_compare.compare({1: 2.0, 2: 0.0, 3: 1.0}, {3: 1.5, 1: 2.0, 2: 0.0})
    assert [row.step for row in rows] == [1, 2, 3]
    assert [row.absolute for row in rows] == [0.0, 0.0, 0.5]
    assert [row.relative for row in rows] == pytest.approx([0.0, 0.0, 1 / 3])
    assert loss_compare.report(rows, tolerance=0.34) is True
    assert "largest difference: 5.000e-01 absolute, 3.333e-01 relative" in capsys.readouterr().out
    assert loss_compare.report(rows, tolerance=0.33) is False
    assert capsys.readouterr().out.count("<-") == 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({1: 1.0, 2: 1.0}, {1: 1.0}, r"steps 1\.\.2 \(2\), B at steps 1\.\.1 \(1\)"),
        ({}, {}, "A logged a loss at steps none"),
    ],
)
def test_curves_of_other_steps_are_no_comparison(loss_compare, a, b, message):
    with pytest.raises(CoordExpError, match=message):
        loss_compare.compare(a, b)


def test_other_data_and_bad_flags_are_refused_before_anything_runs(loss_compare, config: Path, capsys):
    data = config.parent / "other.jsonl"
    data.write_text("")
    command = [str(config), str(config), "--set-b", f"custom.train_jsonl={data}"]
    assert loss_compare.main(command) == 2
    assert "losses can be compared on the same data only" in capsys.readouterr().err
    assert loss_compare.main([str(config), str(config), "--set", "custom.hed=plain"]) == 2
    assert "custom.hed" in capsys.readouterr().err
    assert loss_compare.main([str(config), str(config), "--keep", str(config.parent)]) == 2
    assert "expected a folder to be made" in capsys.readouterr().err
    assert not (config.parent / "never_used").exists()
