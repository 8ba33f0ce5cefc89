"""Settings of a mixture of data sets: what they become, and what is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config
from coordexp.config.run.machine import missing_paths
from coordexp.errors import ConfigError

FUSION = """\
custom:
  fusion:
    sources:
      - {name: a, train_jsonl: "a/*.jsonl", val_jsonl: val.jsonl, weight: 3}
      - {name: b, train_jsonl: [b.jsonl], weight: 1}
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("a/2.jsonl", "a/1.jsonl", "b.jsonl", "val.jsonl"):
        (tmp_path / name).write_text("{}\n")


def load(text: str, *overrides: str):
    Path("run.yaml").write_text(text)
    return load_run_config("run.yaml", overrides, checks=(missing_paths,))


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_files_of_all_sources_become_the_data_of_the_run():
    config = load(FUSION)
    assert config.swift["dataset"] == ["a/1.jsonl", "a/2.jsonl", "b.jsonl"]
    assert config.swift["val_dataset"] == ["val.jsonl"]
    travels = config.to_swift_flat()["coordexp"]["custom"]["fusion"]
    assert travels["sources"][0] == {
        "name": "a", "train_jsonl": ["a/*.jsonl"], "val_jsonl": ["val.jsonl"], "weight": 3.0,
    }  # fmt: skip


def test_flat_form_takes_it_with_exactly_its_files():
    flat = "custom_trainer_variant: stage1_coord\ncoordexp:\n" + "".join(
        f"  {line}\n" for line in FUSION.splitlines()
    )
    same = "dataset: [a/1.jsonl, a/2.jsonl, b.jsonl]\nval_dataset: [val.jsonl]\n"
    assert load(flat + same).swift["dataset"] == load(flat).swift["dataset"]


def test_one_data_set_of_several_files():
    config = load("custom: {train_jsonl: [b.jsonl, 'a/*.jsonl'], val_jsonl: val.jsonl}")
    assert config.swift["dataset"] == ["b.jsonl", "a/1.jsonl", "a/2.jsonl"]
    assert config.swift["val_dataset"] == ["val.jsonl"]
    assert "custom.train_jsonl" in refused("custom: {train_jsonl: 'none/*.jsonl'}")
    assert "matches no file" in refused("custom: {train_jsonl: 'none/*.jsonl'}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: b", "name: a"), "two sources are called a; every data set needs a name of its own"),
        (("name: b", "name: a/b"), "custom.fusion.sources[1].name"),
        (("weight: 1", "weight: 0"), "custom.fusion.sources[1].weight = 0"),
        (("weight: 1", "weight: 1.0e-7"), "weight 1e-07 of b is less than a millionth of all"),
        (("weight: 1", "wieght: 1"), "custom.fusion.sources[1].wieght"),
        (("b.jsonl", "c.jsonl"), 'custom.fusion = "c.jsonl" in run.yaml:2: does not exist.'),
        (("[b.jsonl]", "[]"), "custom.fusion.sources[1].train_jsonl"),
        (("[b.jsonl]", "[a/1.jsonl]"), "a/1.jsonl belongs to both a and b; a record has one data set."),
        (
            ("  fusion:\n", "  fusion:\n    samples_per_epoch: 9\n    stopping_strategy: all_exhausted\n"),
            "samples_per_epoch and stopping_strategy both say how long an epoch is; keep one of them",
        ),
    ],
)
def test_what_cannot_be_meant(change, said):
    assert said in refused(FUSION.replace(*change))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "data: {dataset: [b.jsonl]}",
            "names the data sets of the run, so `dataset` must be left out (coordexp train fills it in); plain "
            "`swift sft` needs dataset: [a/1.jsonl, a/2.jsonl, b.jsonl].",
        ),
        ("  train_jsonl: b.jsonl", "custom.fusion names the data sets of the run; write train_jsonl in its sources."),
        ("training: {packing: true}\ndata: {group_by_length: true}", "would change the order that keeps the shares"),
        ("data: {split_dataset_ratio: 0.1}", "give sources a val_jsonl."),
        ("data: {interleave_prob: [0.5, 0.5]}", "weights say the same."),
    ],
)  # fmt: skip
def test_what_has_no_place_beside_it(more, said):
    assert said in refused(FUSION + more + "\n")
