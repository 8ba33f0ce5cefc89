"""Pictures that inference cannot use, of every kind: named as an error, or left out with a line that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.bad_pictures import BAD, SIZE, encoded, noise

from coordexp.cli.main import main
from coordexp.eval.predictions.artifacts import GT_VS_PRED, TOKEN_TRACE
from coordexp.eval.predictions.log import PARTIAL

pytestmark = pytest.mark.slow
GOOD = ("a.png", "b.png", "c.png", "d.png")
SEEN_WHEN_DECODED = ("float.tiff", "broken.png")


def write_data(folder: Path, names: list[str]) -> Path:
    """Pictures and a data file with one object in each."""
    rows = []
    for index, name in enumerate(names):
        content, size, _ = BAD.get(name, (encoded(noise(index), "PNG"), SIZE, ""))
        if content is not None:
            (folder / name).write_bytes(content)
        rows.append(
            {
                "images": [name], "width": size[0], "height": size[1],
                "objects": [{"desc": "cat", "bbox_2d": [0, 0, 500, 500]}],
            }
        )  # fmt: skip
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "d.jsonl"


@pytest.fixture
def infer(nano_model: Path, tmp_path: Path):
    def run(*more: object, output: str = "out") -> int:
        argv = ["infer", "--model", nano_model, "--data", tmp_path / "d.jsonl", "--output", tmp_path / output,
                "--max-new-tokens", 4, "--batch-size", 2, *more]  # fmt: skip
        return main([str(item) for item in argv])

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def without_times(path: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(path)]


def test_every_kind_is_an_error_that_names_file_line_and_reason(infer, tmp_path: Path, capsys):
    write_data(tmp_path, [GOOD[0], *BAD])
    assert infer() == 2
    said = capsys.readouterr().err
    for number, (name, (_, _, reason)) in enumerate(BAD.items(), start=2):
        named = [line for line in said.splitlines() if f"d.jsonl:{number}: " in line]
        assert [name in line and reason in line for line in named] == (
            [] if name in SEEN_WHEN_DECODED else [True]
        )
    assert "7 records have unusable pictures (--bad-images skip" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BAD)
def test_a_single_one_is_named_in_one_line(infer, tmp_path: Path, capsys, name: str):
    write_data(tmp_path, [GOOD[0], name])
    assert infer("--limit", 2) == 2
    said = capsys.readouterr().err.splitlines()
    error = next(line for line in said if line.startswith("coordexp infer: "))
    assert "d.jsonl:2: " in error
    assert name in error
    assert BAD[name][2] in error


def test_left_out_they_have_lines_without_predictions_and_evaluation_keeps_them(
    infer, tmp_path: Path, capsys
):
    names = [GOOD[0], *BAD, GOOD[1]]
    write_data(tmp_path, names)
    assert infer("--bad-images", "skip") == 0
    assert f"9 of {len(names)} images have pictures that could not be used" in capsys.readouterr().out
    found = lines(tmp_path / "out" / GT_VS_PRED)
    assert [(line["image_id"], line["image"]) for line in found] == list(enumerate(names))
    for number, line in enumerate(found, start=1):
        if line["image"] in BAD:
            assert line["errors"] == {"bad_picture": 1}
            assert line["pred"] == []
            assert f"d.jsonl:{number}: " in line["bad_picture"]
            assert BAD[line["image"]][2] in line["bad_picture"]
        else:
            assert "bad_picture" not in line
    recorded = json.loads((tmp_path / "out" / "infer_run.json").read_text())
    assert (recorded["bad_images"], recorded["num_bad_pictures"]) == ("skip", 9)
    assert main(["score", "--run", str(tmp_path / "out"), "--constant"]) == 0
    assert main(["eval", "--run", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "9 images whose picture inference could not use" in said
    assert "their 9 objects count as missed" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    counted = {
        key: metrics[key] for key in ("num_images", "num_gt", "num_bad_pictures", "num_gt_of_bad_pictures")
    }
    assert counted == {
        "num_images": 11, "num_gt": 11, "num_bad_pictures": 9, "num_gt_of_bad_pictures": 9,
    }  # fmt: skip
    assert "bad_picture" not in metrics["drop_reasons"]


def test_what_was_answered_before_a_broken_picture_is_kept(infer, tmp_path: Path, capsys):
    names = [GOOD[0], GOOD[1], GOOD[2], "broken.png", GOOD[3], "float.tiff"]
    write_data(tmp_path, names)
    assert infer() == 2
    said = capsys.readouterr().err
    assert "d.jsonl:4: " in said
    assert "d.jsonl:6: " in said  # named before its turn
    assert "The 2 answers so far are kept" in said
    kept = (tmp_path / "out" / f"{GT_VS_PRED}{PARTIAL}").read_bytes()
    assert len(kept.splitlines()) == 2
    assert infer("--bad-images", "skip") == 0
    assert "holds 2 of 6 images; going on" in capsys.readouterr().out
    assert (tmp_path / "out" / GT_VS_PRED).read_bytes().startswith(kept)
    assert infer("--bad-images", "skip", output="whole") == 0
    for name in (GT_VS_PRED, TOKEN_TRACE):
        assert without_times(tmp_path / "out" / name) == without_times(tmp_path / "whole" / name)


def test_a_run_that_left_some_out_goes_on_after_it_was_stopped(infer, tmp_path: Path):
    write_data(tmp_path, ["text.jpg", GOOD[0], "broken.png", "thin.png", GOOD[1]])
    assert infer("--bad-images", "skip") == 0
    whole = {name: without_times(tmp_path / "out" / name) for name in (GT_VS_PRED, TOKEN_TRACE)}
    for name in whole:
        path = tmp_path / "out" / name
        content = path.read_bytes().splitlines(keepends=True)
        path.rename(path.with_name(f"{name}{PARTIAL}")).write_bytes(b"".join(content[:3]) + content[3][:9])
    assert infer("--bad-images", "skip") == 0
    for name, expected in whole.items():
        assert without_times(tmp_path / "out" / name) == expected
