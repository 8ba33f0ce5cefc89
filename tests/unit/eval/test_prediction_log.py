"""A run that was stopped at any moment goes on and ends with the very lines of one that was not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import GT_VS_PRED, RUN_META, SCORED, TOKEN_TRACE
from coordexp.eval.predictions.log import PARTIAL, PredictionLog

NUM_IMAGES, CHUNK = 7, 2
SETTINGS = {"model_hash": "aa", "decoding": {"max_new_tokens": 9, "torch_dtype": "float32"}}


def opened(folder: Path, *, settings=SETTINGS, overwrite=False, num_images=NUM_IMAGES):
    return PredictionLog.open(
        folder,
        settings,
        num_images=num_images,
        chunk_size=CHUNK,
        overwrite=overwrite,
        notes={"data": "/d.jsonl"},
    )


def lines_of(image_id: int) -> tuple[dict, dict]:
    return {"image_id": image_id, "pred": "é\u2028" * image_id}, {
        "image_id": image_id,
        "tokens": [image_id] * 3,
    }


def answer(log: PredictionLog, *, stop_after: int | None = None) -> list[int]:
    """Answer what is left, or so many chunks of it; returns the images that were answered."""
    answered = []
    for start in range(log.num_done, NUM_IMAGES, CHUNK):
        if stop_after == 0:
            return answered
        stop_after = None if stop_after is None else stop_after - 1
        images = range(start, min(start + CHUNK, NUM_IMAGES))
        lines, traces = zip(*map(lines_of, images), strict=True)
        log.append(lines, traces)
        answered += images
    log.finish()
    return answered


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of a run that was never stopped."""
    with opened(tmp_path / "whole") as log:
        assert answer(log) == list(range(NUM_IMAGES))
    return contents(tmp_path / "whole")


def test_an_unbroken_run_leaves_two_files_in_order(whole):
    assert set(whole) == {GT_VS_PRED, TOKEN_TRACE}
    assert [json.loads(line) for line in whole[GT_VS_PRED].splitlines()] == [
        lines_of(i)[0] for i in range(NUM_IMAGES)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_killed_at_any_byte_of_either_file(whole, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    with opened(folder) as log:
        answer(log, stop_after=0)
    cuts = {name: rng.randint(0, len(data)) for name, data in whole.items()}
    for name, cut in cuts.items():
        (folder / f"{name}{PARTIAL}").write_bytes(whole[name][:cut])
    complete = min(whole[name][:cut].count(b"\n") for name, cut in cuts.items())
    with opened(folder) as log:
        expected = complete if complete == NUM_IMAGES else complete - complete % CHUNK
        assert log.num_done == expected
        assert answer(log) == list(range(expected, NUM_IMAGES))
    assert contents(folder) == whole


@pytest.mark.parametrize("chunks", [0, 1, 2, 3])
def test_stopped_between_chunks(whole, tmp_path, chunks):
    with opened(tmp_path / "r") as log:
        answer(log, stop_after=chunks)
    assert not (tmp_path / "r" / GT_VS_PRED).exists()
    with opened(tmp_path / "r") as log:
        assert log.num_done == chunks * CHUNK
        answer(log)
    assert contents(tmp_path / "r") == whole


@pytest.mark.parametrize("renamed", [(), (TOKEN_TRACE,), (TOKEN_TRACE, GT_VS_PRED)])
def test_killed_between_the_last_line_and_the_last_rename(whole, tmp_path, renamed):
    folder = tmp_path / "r"
    with opened(folder):
        pass
    for name, data in whole.items():
        (folder / (name if name in renamed else f"{name}{PARTIAL}")).write_bytes(data)
    with opened(folder) as log:
        assert answer(log) == []
    assert contents(folder) == whole


def test_half_a_line_at_the_end_of_a_disk_that_lost_power(whole, tmp_path):
    folder = tmp_path / "r"
    with opened(folder) as log:
        answer(log, stop_after=2)
    for name in whole:
        with (folder / f"{name}{PARTIAL}").open("ab") as stream:
            stream.write(b"\0\0\0\n")
    with opened(folder) as log:
        assert log.num_done == 4
        answer(log)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_hash": "bb"}, 'model_hash: "aa" there, "bb" now'),
        (
            {"decoding": {"max_new_tokens": 8, "torch_dtype": "float32"}},
            "decoding.max_new_tokens: 9 there, 8 now",
        ),
        ({"prompt": "?"}, 'prompt: null there, "?" now'),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path, changes, message):
    with opened(tmp_path) as log:
        answer(log, stop_after=1)
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught, opened(tmp_path, settings={**SETTINGS, **changes}):
        pass
    assert message in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert contents(tmp_path) == before


def test_overwrite_starts_anew_and_drops_the_scores(whole, tmp_path):
    with opened(tmp_path / "r", settings={"model_hash": "old"}) as log:
        answer(log, stop_after=2)
    (tmp_path / "r" / SCORED).write_text("{}\n")
    with opened(tmp_path / "r", overwrite=True) as log:
        assert log.num_done == 0
        answer(log)
    assert contents(tmp_path / "r") == whole
    assert json.loads((tmp_path / "r" / RUN_META).read_text()) == {**SETTINGS, "data": "/d.jsonl"}


def test_predictions_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / GT_VS_PRED).write_text('{"image_id": 0}\n')
    with pytest.raises(ConfigError, match=r"holds gt_vs_pred.jsonl but no infer_run.json"), opened(tmp_path):
        pass


def test_two_processes_cannot_write_one_run(tmp_path):
    with opened(tmp_path), pytest.raises(ConfigError, match="another process is writing"), opened(tmp_path):
        pass


@pytest.mark.parametrize("line", ['{"image_id": 5}', "not json", "[]"])
def test_a_changed_file_is_not_continued(tmp_path, line):
    with opened(tmp_path) as log:
        answer(log, stop_after=2)
    path = tmp_path / f"{GT_VS_PRED}{PARTIAL}"
    rows = path.read_text().split("\n")
    path.write_text("\n".join([rows[0], line, *rows[2:]]))
    with pytest.raises(RecordError, match=rf"{GT_VS_PRED}.partial:2"), opened(tmp_path):
        pass


def test_an_incomplete_run_gets_no_final_names(tmp_path):
    with opened(tmp_path) as log:
        answer(log, stop_after=1)
        with pytest.raises(RecordError, match="2 of 7 images"):
            log.finish()
