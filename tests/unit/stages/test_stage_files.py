"""What a runner reads off a run folder: series with broken numbers, whole and torn checkpoints, missing files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordexp.metrics.payload import build_payload
from coordexp.models.checkpoints import (
    best_of,
    is_final,
    is_whole,
    last_whole,
    mend_best_link,
    missing_files,
    resumable,
)
from coordexp.stages.series import series_of

NONFINITE = "health/nonfinite_metrics_total"
FULL = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "processor_config.json",
    "coordexp_prompt.json",
)


def record(step: int, mode: str = "train", **metrics: float):
    return build_payload(mode, step, metrics)


def test_a_series_has_nan_where_a_number_was_not_finite():
    payloads = [
        record(1, loss=3.0),
        record(2, **{NONFINITE: 1.0}),
        record(2, "eval", eval_loss=2.0),
        record(3, loss=1.0, **{NONFINITE: 1.0}),  # another number was not finite
    ]
    (first, second, third) = series_of(payloads, "loss")
    assert (first, third) == ((1, 3.0), (3, 1.0))
    assert second[0] == 2
    assert math.isnan(second[1])
    assert series_of(payloads, "eval_loss") == [(2, 2.0)]


def test_records_after_a_resume_hold_and_what_they_undo_is_gone():
    payloads = [record(step, loss=float(step)) for step in (1, 2, 3)]
    payloads += [record(2, loss=20.0), record(4, loss=40.0)]
    assert series_of(payloads, "loss") == [(1, 1.0), (2, 20.0), (4, 40.0)]


def checkpoint(run: Path, step: int, *, best: int | None = None, max_steps: int = 9) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FULL:
        (folder / name).write_text("{}")
    save_file({"w": np.zeros(4, np.float32)}, folder / "model.safetensors")
    (folder / "optimizer.pt").touch()
    state = {"global_step": step, "max_steps": max_steps, "best_global_step": best}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
@pytest.mark.parametrize("harm", [tear, Path.unlink], ids=["torn", "gone"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path, name, harm):
    first, last = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    assert last_whole(tmp_path) == resumable(tmp_path) == last
    harm(last / name)
    assert not is_whole(last)
    assert last_whole(tmp_path) == resumable(tmp_path) == first


def test_weights_alone_are_no_place_to_go_on_from(tmp_path):
    last = checkpoint(tmp_path, 2)
    (last / "optimizer.pt").unlink()
    assert (last_whole(tmp_path), resumable(tmp_path)) == (last, None)


def test_the_last_step_of_a_run_is_known_by_its_checkpoint(tmp_path):
    assert [is_final(checkpoint(tmp_path, step)) for step in (8, 9)] == [False, True]


def test_the_link_to_the_best_is_mended(tmp_path):
    best, _ = checkpoint(tmp_path, 2), checkpoint(tmp_path, 9, best=2)
    (tmp_path / "best").symlink_to("checkpoint-9")
    assert best_of(tmp_path) == mend_best_link(tmp_path) == best
    assert (tmp_path / "best").resolve() == best.resolve()


def test_no_best_where_no_evaluation_picked_one(tmp_path):
    checkpoint(tmp_path, 9)
    assert mend_best_link(tmp_path) is None
    assert not (tmp_path / "best").exists()


def test_every_missing_file_is_named(tmp_path):
    resolved = {"swift": {"tuner_type": "full"}, "custom": {"coord_offset": {"enabled": True}}}
    whole = checkpoint(tmp_path, 2)
    save_file({"embed": np.zeros(4, np.float32)}, whole / "coord_offset.safetensors")
    assert missing_files(whole, resolved) == []
    for name in (*FULL, "coord_offset.safetensors"):
        content = (whole / name).read_bytes()
        (whole / name).unlink()
        (said,) = missing_files(whole, resolved)
        assert name in said
        (whole / name).write_bytes(content)
    tear(whole / "model.safetensors")
    (said,) = missing_files(whole, resolved)
    assert said.startswith("model.safetensors: broken")


def test_an_adapter_needs_its_weights_and_the_tokenizer_of_the_model_under_it(tmp_path):
    base = checkpoint(tmp_path / "base", 1)
    adapter = tmp_path / "checkpoint-3"
    adapter.mkdir()
    (adapter / "coordexp_prompt.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    resolved = {"swift": {"tuner_type": "lora"}}
    assert missing_files(adapter, resolved) == ["adapter_model.safetensors: weights of the adapter"]
    save_file({"a": np.zeros(4, np.float32)}, adapter / "adapter_model.safetensors")
    assert missing_files(adapter, resolved) == []
    (base / "tokenizer.json").unlink()
    (said,) = missing_files(adapter, resolved)
    assert said.startswith(f"{base}/tokenizer.json or vocab.json")


def test_a_sharded_model_needs_every_shard(tmp_path):
    whole = checkpoint(tmp_path, 2)
    (whole / "model.safetensors").rename(whole / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing_files(whole, {"swift": {}}) == ["model-2-of-2.safetensors: weights of the model"]
