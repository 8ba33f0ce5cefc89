"""`coordexp sweep` on a trained tiny model: a normal run for each way, what K answers know, nothing done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from coordexp.cli.main import main
from coordexp.eval.evaluate import evaluate, from_run
from coordexp.eval.oracle import oracle_of
from coordexp.eval.predictions.image_result import Objects
from coordexp.eval.report.sweep import write_sweep
from coordexp.inference.infer import infer_file

pytestmark = pytest.mark.slow
K = 3
GREEDY, SAMPLED, GUIDED = "t0_r1_median_free", "t1.3_r1_median_free", "t0_r1_median_guided"


def sweep(taught_model: Path, scenes: Path, out: Path, *more: str) -> int:
    return main(
        ["sweep", "--model", str(taught_model), "--data", str(scenes / "train.jsonl"), "--out", str(out),
         "--temperature", "0", "1.3", "--readout", "median", "--guided", "off", "on", "--k", str(K),
         "--limit", "4", "--max-new-tokens", "160", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(taught_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert sweep(taught_model, scenes, out) == 0
    return out


def test_every_way_is_a_normal_run_of_its_own(swept: Path, taught_model: Path, scenes: Path, tmp_path: Path):
    found = json.loads((swept / "sweep.json").read_text())
    assert [way["name"] for way in found["ways"]] == [GREEDY, GUIDED, SAMPLED, "t1.3_r1_median_guided"]
    alone = {"coord": "median", "limit": 4, "max_new_tokens": 160}
    infer_file(taught_model, scenes / "train.jsonl", tmp_path, **alone)
    assert (tmp_path / "gt_vs_pred.jsonl").read_bytes() == (swept / GREEDY / "gt_vs_pred.jsonl").read_bytes()
    for way in found["ways"]:
        metrics = [evaluate(from_run(swept / folder)).metrics for folder in way["folders"]]
        assert way["AP"] == pytest.approx(sum(one["AP"] for one in metrics) / len(metrics))
        assert {one["decoding"]["guided"] for one in metrics} == {way["guided"]}
        assert way["tokens_per_second"] > way["boxes_per_second"] > 0
        if way["guided"]:
            assert way["drops"] == way["truncated"] == 0
    texts = {(swept / SAMPLED / f"answer-{i}" / "gt_vs_pred.jsonl").read_text() for i in range(K)}
    assert len(texts) > 1
    assert "| 1.3 | 1 | median | on |" in (swept / "sweep.md").read_text()


def test_what_sampled_answers_know_is_told(swept: Path, tmp_path: Path):
    oracle = json.loads((swept / "sweep.json").read_text())["oracle"]
    assert [one["greedy"] for one in oracle] == [GREEDY, GUIDED]
    for one in oracle:
        assert one["recall_sampled"] <= one["recall_best_of_k"] <= one["recall_any_of_k"]
        assert one["num_unsaid"] == len(one["unsaid"])
        assert (
            one["recall_any_of_k"] * one["num_gt"]
            <= one["recall_greedy"] * one["num_gt"] + one["num_unsaid"] + 1e-9
        )
    assert (
        main(["report", str(swept / GREEDY), "--output", str(tmp_path / "run.html"), "--bootstrap", "0"]) == 0
    )
    assert 'id="ways"' in (tmp_path / "run.html").read_text()


def test_the_page_shows_what_was_seen_and_not_said(swept: Path, tmp_path: Path):
    """A sweep in which the greedy answers say nothing, the guided ones all they know."""
    folder = tmp_path / "out"
    shutil.copytree(swept, folder)
    images = from_run(swept / GUIDED).images
    silent = [replace(image, pred=Objects.of([], [], scores=[])) for image in images]
    found = json.loads((folder / "sweep.json").read_text())
    told = oracle_of(silent, [images, silent]).as_json()
    found["oracle"][0] |= told
    (folder / "sweep.json").write_text(json.dumps(found))
    page = write_sweep(folder, tmp_path / "sweep.html").read_text()
    assert told["num_unsaid"] == told["recall_any_of_k"] * told["num_gt"] > 0
    names = {unsaid["file_name"] for unsaid in told["unsaid"]}
    assert all(f'data-unsaid="{name}"' in page for name in names)
    assert page.count("data:image/jpeg") == len(names)
    assert f"{told['unsaid'][0]['desc']} (1 of 2)" in page


def test_what_is_done_is_not_done_again(swept: Path, taught_model: Path, scenes: Path, monkeypatch):
    before = json.loads((swept / "sweep.json").read_text())
    shutil.rmtree(swept / GUIDED)
    times = {path: path.stat().st_mtime_ns for path in swept.rglob("metrics.json")}
    assert sweep(taught_model, scenes, swept) == 0
    after = json.loads((swept / "sweep.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for old, new in zip(before["ways"], after["ways"], strict=True):
        assert (new["AP"], new["num_pred"]) == (old["AP"], old["num_pred"])
    assert after["oracle"] == before["oracle"]
    # with everything there, no model is needed
    monkeypatch.setattr(
        "coordexp.inference.infer.load_backend", lambda *_: pytest.fail("the model was loaded")
    )
    assert sweep(taught_model, scenes, swept) == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--k", "2"], "--k 2 compares sampled answers with the greedy one"),
        (["--temperature", "-1"], "expected a temperature of at least 0"),
        (["--run", "nowhere"], "give either --run RUN, or --model and --data"),
    ],
)
def test_what_makes_no_sweep_is_refused(nano_model: Path, scenes: Path, tmp_path: Path, capsys, flags, says):
    flags = [
        "--model",
        str(nano_model),
        "--data",
        str(scenes / "train.jsonl"),
        "--out",
        str(tmp_path / "out"),
        *flags,
    ]
    assert main(["sweep", *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
