"""Pictures of samples reach the trackers that are on, at their step."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from coordexp.trainers.logs.trackers import TensorBoardPayloads, WandbPayloads

PICTURES = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]


def test_tensorboard_gets_one_image_of_each_sample(tmp_path: Path):
    writer = SummaryWriter(str(tmp_path))
    tracker = TensorBoardPayloads(tmp_path / "resolved_config.json")
    tracker.tb_writer = writer
    tracker.show("samples", PICTURES, ["a:1", "a:2"], 30)
    writer.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    found.Reload()
    assert found.Tags()["images"] == ["samples/00", "samples/01"]
    (image,) = found.Images("samples/01")
    assert (image.step, image.width, image.height) == (30, 6, 4)


def test_wandb_gets_them_under_one_key_with_their_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="samples")
    tracker = WandbPayloads(tmp_path / "resolved_config.json")
    tracker.show("samples", PICTURES, ["a:1", "a:2"], 30)  # not started: nothing is sent
    assert "samples" not in run.summary.keys()  # noqa: SIM118
    tracker._initialized = True
    tracker.show("samples", PICTURES, ["a:1", "a:2"], 30)
    sent = dict(run.summary["samples"])
    run.finish()
    assert (sent["_type"], sent["count"], sent["captions"]) == ("images/separated", 2, ["a:1", "a:2"])
    assert len(list(tmp_path.rglob("samples*.png"))) == 2
