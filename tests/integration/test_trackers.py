"""The records of a run and of its resume, read back from what four trackers wrote without a network. About 2 min."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_swift, sft_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordexp.config.run.machine import TRACKERS
from coordexp.metrics.sinks import read_payloads

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Record = tuple[int, dict[str, float]]
"""(step, numbers)"""
REPORT_TO = ("tensorboard", "wandb", "swanlab", "trackio")


def installed(name: str) -> None:
    pytest.importorskip(TRACKERS[name][0], reason=f"{name} is not installed (make setup)")


@pytest.fixture(scope="module")
def folder(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with a checkpoint at the second; then from there to the fourth."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "wandb").mkdir()
    environment = {
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder / "wandb"), "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": str(folder / "swanlab"), "TRACKIO_DIR": str(folder / "trackio"),
    }  # fmt: skip
    for name in REPORT_TO:
        installed(name)
    for steps in (
        {"max_steps": 3},
        {"max_steps": 4, "resume_from_checkpoint": folder / "run" / "checkpoint-2"},
    ):
        flags = sft_flags(
            nano_model, scenes, folder / "run", report_to=REPORT_TO, eval_strategy="steps", eval_steps=2,
            save_strategy="steps", save_steps=2, **steps,
        )  # fmt: skip
        done = run_swift("sft", *flags, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def payloads(folder: Path) -> list[Record]:
    return [(p["global_step"], p["metrics"]) for p in read_payloads(folder / "run" / "metrics.jsonl")]


def steps_of(records: list[Record], key: str) -> list[tuple[int, float]]:
    return [(step, numbers[key]) for step, numbers in records if key in numbers]


KEYS = ("loss", "train/tokens_seen", "time/share_forward", "coord_diag/loss", "eval_loss", "train_loss")


def test_the_payload_itself(payloads):
    assert [step for step, _ in steps_of(payloads, "loss")] == [1, 2, 3, 3, 4]
    tokens = [seen for _, seen in steps_of(payloads, "train/tokens_seen")]
    assert tokens == [tokens[0] * step for step in (1, 2, 3, 3, 4)]


def test_tensorboard_shows_each_step_once(folder, payloads):
    events = EventAccumulator(str(folder / "run" / "runs"))
    events.Reload()
    for key in ("loss", "train/tokens_seen", "coord_diag/loss"):
        last = dict(steps_of(payloads, key))
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx(last, rel=1e-6), key
        assert len(events.Scalars(key)) == len(last)
    # The evaluation at step 3 was the first attempt's, beyond the checkpoint.
    assert [event.step for event in events.Scalars("eval_base_ce/loss")] == [2, 4]
    [text] = events.Tensors("resolved_config/text_summary")[0].tensor_proto.string_val
    assert json.loads(text)["trainer_variant"] == "stage1_coord"


def test_wandb_has_one_run_of_both_attempts(folder, payloads):
    runs, artifacts, found = set(), [], []
    for path in sorted((folder / "wandb").rglob("*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                runs.add(record.run.run_id)
            if record.WhichOneof("record_type") == "artifact":
                artifacts.append([entry.path for entry in record.artifact.manifest.contents])
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                found.append((items["train/global_step"], items))
    assert len(runs) == 1
    assert artifacts == [["resolved_config.json"]] * 2
    for key in KEYS:
        assert steps_of(found, key) == steps_of(payloads, key), key


def test_swanlab_has_one_run_of_both_attempts(folder, payloads):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record as SwanLabRecord
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    paths = sorted((folder / "swanlab").rglob("*.swanlab"))
    assert len(paths) == 2
    assert len({path.name for path in paths}) == 1  # named by the run
    found: list[Record] = []
    for path in paths:
        reader = DataStoreReader()
        reader.open(path)
        for raw in reader:
            record = SwanLabRecord.FromString(raw)
            if record.HasField("scalar"):
                found.append((record.scalar.step, {record.scalar.key: record.scalar.value.number}))
        assert "trainer_variant" in (path.parent / "files" / "config.yaml").read_text()
    for key in KEYS:
        expected = steps_of(payloads, key)
        assert steps_of(found, key) == [(step, pytest.approx(value)) for step, value in expected], key


def test_trackio_goes_on_with_its_run(folder, payloads):
    [path] = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
        names = database.execute("select name from artifacts").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    found = [(step, json.loads(metrics)) for _, step, metrics in rows]
    for key in KEYS:
        assert steps_of(found, key) == steps_of(payloads, key), key
    assert names == [("resolved_config",)]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: protocol buffers in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last
            yield WandbRecord.FromString(parts)
            parts = b""
