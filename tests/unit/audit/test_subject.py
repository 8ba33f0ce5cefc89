"""What an audit trains on, for recipes that name their data themselves or in what they extend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from coordexp.audit.subject import load_subject
from coordexp.config import load_run_config

CUSTOM = {"trainer_variant": "stage1_coord", "train_jsonl": "own.jsonl"}
FORMS = {
    "sections": {"custom": CUSTOM},
    "flat": {"custom_trainer_variant": "stage1_coord", "dataset": ["own.jsonl"]},
}


@pytest.mark.parametrize("extends", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_first_records_stand_in_place_of_the_recipe_s_own_data(
    tmp_path: Path, monkeypatch, form: str, extends: bool
):
    monkeypatch.chdir(tmp_path)
    model = {"model": str(tmp_path)}
    parent = FORMS[form] | ({"model": model} if form == "sections" else model)
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    child = {"extends": "parent.yaml"} if extends else parent
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(child))
    lines = []
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"images": [f"{name}.png"], "width": 8, "height": 8, "objects": []}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    subject = load_subject(
        tmp_path / "run.yaml", tmp_path / "data.jsonl", samples=2, overrides=(), work=tmp_path / "work"
    )
    assert [path.name for record in subject.records for path in record.image_paths()] == ["a.png", "b.png"]
    config = load_run_config(subject.run_file, overrides=list(subject.overrides))
    assert config.swift["dataset"] == [str(subject.data)]
