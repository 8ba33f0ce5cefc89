"""`coordexp.Detector` on a taught model: what it finds is what `coordexp infer` and `coordexp score` find."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import coordexp
from coordexp.cli.main import main
from coordexp.errors import ConfigError, RecordError

pytestmark = pytest.mark.slow
NEW_TOKENS = 96
PAGE = Path(__file__).resolve().parents[2] / "runbooks" / "use_a_model.md"


@pytest.fixture(scope="module")
def detector(taught_model: Path) -> Iterator[coordexp.Detector]:
    with coordexp.Detector.from_pretrained(taught_model, batch_size=4, max_new_tokens=NEW_TOKENS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pictures(scenes: Path) -> list[Path]:
    return [scenes / record.images[0] for record in coordexp.load_records(scenes / "train.jsonl")]


def test_it_finds_what_infer_and_score_find(
    detector, taught_model: Path, scenes: Path, pictures, tmp_path: Path
):
    run = tmp_path / "run"
    flags = [
        "--data",
        scenes / "train.jsonl",
        "--output",
        run,
        "--max-new-tokens",
        NEW_TOKENS,
        "--batch-size",
        3,
    ]
    assert (
        main(
            [str(arg) for arg in ("infer", "--model", taught_model, "--coord", "median", "--guided", *flags)]
        )
        == 0
    )
    assert main(["score", "--run", str(run), "--method", "expected_iou"]) == 0
    lines = [json.loads(text) for text in (run / "gt_vs_pred_scored.jsonl").read_text().splitlines()]
    found = detector(pictures)
    assert len(found) == len(lines) == 8
    assert sum(map(len, found)) >= 8
    for mine, line in zip(found, lines, strict=True):
        assert mine.xyxy.tolist() == [obj["points"] for obj in line["pred"]]
        assert list(mine.labels) == [obj["desc"] for obj in line["pred"]]
        assert mine.scores.tolist() == pytest.approx([obj["score"] for obj in line["pred"]], abs=1e-4)
        assert mine.score_source == line["pred_score_source"]
        np.testing.assert_allclose(mine.bins * 63 / 999, mine.xyxy)
        assert mine.text.startswith('{"objects": [')
    metrics = coordexp.evaluate(coordexp.load_records(scenes / "train.jsonl"), found)
    assert main(["eval", "--run", str(run)]) == 0
    expected = json.loads((run / "metrics.json").read_text())
    assert metrics["AP50"] == pytest.approx(expected["AP50"])
    assert metrics["AR100"] == pytest.approx(expected["AR100"])


def test_a_path_a_picture_and_pixels_are_answered_alike(detector, pictures):
    with Image.open(pictures[0]) as opened:
        found = [detector(one) for one in (str(pictures[0]), opened, np.asarray(opened.convert("RGB")))]
    assert len(found[0])
    for other in found[1:]:
        assert other.text == found[0].text
        assert other.xyxy.tolist() == found[0].xyxy.tolist()
        assert other.scores.tolist() == found[0].scores.tolist()


def test_each_call_reads_coordinates_as_it_says(detector, pictures):
    default, mean, again = (detector(pictures[2], readout=how) for how in (None, "expectation", "median"))
    free = detector(pictures[2], readout="median", guided=False)
    assert len(default)
    assert default.text == again.text == free.text  # guided, a good answer is the same one
    assert mean.text != default.text
    with pytest.raises(ConfigError, match="readout is 'mode'"):
        detector(pictures[2], readout="mode")


def test_classes_are_asked_for_and_others_dropped(detector, taught_model: Path, pictures):
    tokenizer = AutoTokenizer.from_pretrained(taught_model)
    plain = detector(pictures)
    chosen = Counter(label for one in plain for label in one.labels).most_common(1)[0][0]
    asked = detector(pictures[:4], classes=[chosen.upper()])
    assert [one.text for one in asked] != [one.text for one in plain[:4]]  # another question
    for found in asked:
        assert set(found.labels) <= {chosen.upper()}
        named = [obj.desc == chosen for obj in coordexp.parse(found.text, tokenizer).objects]
        assert (len(found), found.dropped.get("not_in_classes", 0)) == (sum(named), len(named) - sum(named))
    with pytest.raises(ConfigError, match="classes is empty"):
        detector(pictures[0], classes=[])


def test_pictures_that_cannot_be_used_are_all_named_before_any_is_asked(detector, pictures, tmp_path: Path):
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(RecordError) as error:
        detector([pictures[0], tmp_path / "page.jpg", "https://host/a.jpg", tmp_path / "none.png"])
    said = str(error.value).splitlines()
    assert said[0] == "3 of 4 pictures cannot be used:"
    for line, (name, reason) in zip(
        said[1:],
        [
            ("page.jpg", "no picture"),
            ("https://host/a.jpg", "not downloaded"),
            ("none.png", "does not exist"),
        ],
        strict=True,
    ):
        assert name in line
        assert reason in line


def test_what_is_no_model(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a model folder"):
        coordexp.Detector.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not a model folder"):
        coordexp.Detector.from_pretrained("./runs/none")
    with pytest.raises(ConfigError, match="coordexp-tests/none is neither a folder nor a model"):
        coordexp.Detector.from_pretrained("coordexp-tests/none")


def test_the_page_on_using_a_model_runs(taught_model: Path, scenes: Path, tmp_path: Path, monkeypatch):
    """Its Python blocks, with the taught model where the demo's would be."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks)
    for name, target in ((re.findall(r'from_pretrained\("(.*?)"', code)[0], taught_model), ("data", scenes)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    found, several = names["found"], names["several"]
    assert found.text == several[0].text
    assert (found.width, found.height, len(several)) == (64, 64, 2)
    with Image.open("found.png") as drawn:
        assert drawn.size == (320, 320)
    assert len(names["detections"]) == 4
    assert 0.0 <= names["numbers"]["AP"] <= names["numbers"]["AP50"] <= 1.0
