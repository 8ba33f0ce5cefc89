"""Python code that comes with a model does not run, whoever loads it, unless the user allows it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from support.planted import MARKER, PLACES, plant
from support.processes import run_coordexp
from swift.model import MODEL_MAPPING

from coordexp.data.shapes import PRESETS, generate_shapes
from coordexp.errors import ConfigError
from coordexp.swift_bridge.checkpoint import load_model, load_template
from coordexp.swift_bridge.loading import models_as_saved
from coordexp.swift_bridge.remote_code import check_remote_code
from coordexp.trainers.activate import activate_from_argv


@pytest.mark.parametrize("file", PLACES)
def test_no_loader_runs_it(nano_dir: Path, tmp_path: Path, file: str):
    folder = plant(nano_dir, tmp_path / "planted", file)
    for load in (load_template, load_model):
        with pytest.raises(ConfigError, match=rf"{file}: auto_map .*planted_.*--trust-remote-code"):
            load(folder)
    assert not (folder / MARKER).exists()


@pytest.mark.parametrize("command", ["sft.py", "infer.py"])
def test_no_command_of_ms_swift_runs_it(nano_dir: Path, tmp_path: Path, monkeypatch, command: str):
    """Also where the model is named by the checkpoint alone."""
    folder = plant(nano_dir, tmp_path / "planted", "config.json")
    monkeypatch.setattr(sys, "argv", [f"/somewhere/swift/cli/{command}"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "args.json").write_text(json.dumps({"model": str(folder)}))
    for flags in (["--model", str(folder)], ["--adapters", str(adapter)]):
        with pytest.raises(
            ConfigError, match=r"planted comes with Python code.*custom\.trust_remote_code: true"
        ):
            activate_from_argv(flags)
    assert not (folder / MARKER).exists()


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])
    with pytest.raises(ConfigError, match="model /no/such/model: no such folder"):
        activate_from_argv(["--model", "/no/such/model"])


def test_what_is_named_deep_inside_is_found(tmp_path: Path):
    inner = {"text_config": {"layers": [{"auto_map": {"AutoModel": "else.where--modeling.Model"}}]}}
    (tmp_path / "config.json").write_text(json.dumps(inner))
    with pytest.raises(ConfigError, match="modeling"):
        check_remote_code(tmp_path, trusted=False, setting="x")


def test_an_ordinary_folder_passes_and_says_nothing(nano_dir: Path, tmp_path: Path, caplog):
    (tmp_path / "config.json").write_text("{ broken")
    with caplog.at_level(logging.WARNING):
        for folder in (nano_dir, tmp_path):
            for trusted in (False, True):
                check_remote_code(folder, trusted=trusted, setting="x")
    assert not caplog.records


def test_a_run_that_allows_it_loads_and_serves_with_it(nano_dir: Path, tmp_path: Path, monkeypatch, caplog):
    """What vLLM is told follows the loader (`coordexp.swift_bridge.vllm_engine`)."""
    folder = plant(nano_dir, tmp_path / "planted", "config.json")
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/infer.py"])
    with models_as_saved(), caplog.at_level(logging.WARNING):
        allowed = json.dumps({"custom": {"trust_remote_code": True}})
        activate_from_argv(["--model", str(folder), "--coordexp", allowed])
        assert MODEL_MAPPING["qwen3_vl"].loader.default_trust_remote_code is True
        assert "custom.trust_remote_code: true: Python code that comes with" in caplog.text
        activate_from_argv(["--model", str(nano_dir)])
        assert MODEL_MAPPING["qwen3_vl"].loader.default_trust_remote_code is False


@pytest.mark.slow
def test_a_command_runs_it_where_the_user_allows_it_and_says_so(nano_dir: Path, tmp_path: Path, monkeypatch):
    """In processes of their own: the code would stay in this one."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = plant(nano_dir, tmp_path / "planted", *PLACES)
    generate_shapes(tmp_path / "scenes", PRESETS["pixels"], num_train=0, num_val=1, seed=5)
    flags = ["--model", folder, "--data", tmp_path / "scenes" / "val.jsonl", "--output", tmp_path / "out"]
    refused = run_coordexp("infer", *flags, "--max-new-tokens", 2)
    assert refused.returncode == 2
    assert "allow it with --trust-remote-code" in refused.stderr
    assert not (folder / MARKER).exists()
    done = run_coordexp("infer", *flags, "--max-new-tokens", 2, "--trust-remote-code")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--trust-remote-code: Python code that comes with" in done.stderr
    ran = (folder / MARKER).read_text()
    assert all(module in ran for module in ("planted_config", "planted_processor"))
