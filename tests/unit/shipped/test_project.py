"""`coordexp init`: what a project's folder holds, and what is never written over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from coordexp.cli.main import main
from coordexp.config import load_run_config
from coordexp.errors import ConfigError
from coordexp.files import write_json
from coordexp.shipped import PLUGIN_FILE, configs, recipe_file
from coordexp.shipped.project import STAMP, lay_out, project_files
from coordexp.stages.plan import load_stages
from coordexp.study.jobs import check_recipes
from coordexp.study.plan import read_study

FILES = {"README.md", ".gitignore", "configs/smoke.yaml", "configs/stage1.yaml", "configs/stage2.yaml"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_holds_run_files_that_differ_from_the_recipes_in_paths_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "one/project"]) == 0
    assert capsys.readouterr().out.startswith("wrote one/project: .gitignore, README.md, configs/smoke.yaml")
    project = tmp_path / "one" / "project"
    assert content(project).keys() == {*FILES, STAMP}
    assert {path.name for path in project.iterdir() if path.is_dir()} == {"configs", "data", "models", "runs"}
    for name, recipe in (
        ("stage1", "stage1/base"),
        ("stage2", "stage2_two_channel/base"),
        ("smoke", "stage1/smoke"),
    ):
        ours = load_run_config(project / "configs" / f"{name}.yaml", world_size=1)
        theirs = load_run_config(configs() / f"{recipe}.yaml", world_size=1)
        own_paths = {"model", "dataset", "val_dataset", "output_dir", "external_plugins"}
        assert {key for key in ours.swift if ours.swift[key] != theirs.swift[key]} <= own_paths
        assert ours.swift["dataset"] == (
            ["data/shapes/train.jsonl"] if name == "smoke" else ["data/train.jsonl"]
        )
        assert ours.config_hash != theirs.config_hash
    assert load_run_config(project / "configs" / "smoke.yaml").swift["external_plugins"] == [str(PLUGIN_FILE)]


def test_the_same_call_again_changes_nothing_and_keeps_what_is_beside(tmp_path: Path) -> None:
    assert lay_out(tmp_path / "p")
    (tmp_path / "p" / "data" / "train.jsonl").write_text("{}")
    before = content(tmp_path / "p")
    assert not lay_out(tmp_path / "p")
    assert content(tmp_path / "p") == before


def test_an_empty_folder_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that stands in it stays in it."""
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    assert main(["init", "."]) == 0
    assert tmp_path.stat().st_ino == inode
    assert content(Path()).keys() == {*FILES, STAMP}


def test_untouched_files_of_another_release_are_replaced_and_a_call_that_was_cut_off_is_finished(
    tmp_path: Path,
) -> None:
    lay_out(tmp_path)
    want = content(tmp_path)
    hashes = json.loads(want[STAMP])
    (tmp_path / "README.md").write_text("as an earlier release wrote it\n")
    with pytest.raises(
        ConfigError, match=r"holds a project whose README\.md has been changed since; it is left"
    ):
        lay_out(tmp_path)
    earlier = hashlib.sha256(b"as an earlier release wrote it\n").hexdigest()
    write_json(tmp_path / STAMP, {**hashes, "README.md": [earlier]})
    (tmp_path / ".gitignore").unlink()
    assert lay_out(tmp_path)
    assert content(tmp_path) == want


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda folder: (folder / "mine.txt").write_text("x"),
            "is not empty; name a folder that is new or empty.",
        ),
        (
            lambda folder: (lay_out(folder), (folder / "configs" / "stage1.yaml").write_text("mine: 1\n")),
            "holds a project whose configs/stage1.yaml has been changed since; it is left as it is: name a new folder, "
            "and copy from there what you want.",
        ),
    ],
    ids=["another folder", "a project that is in use"],
)
def test_what_is_not_untouched_is_left_as_it_is(tmp_path: Path, prepare, message: str, capsys) -> None:
    prepare(tmp_path)
    before = content(tmp_path)
    assert main(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"coordexp init: {tmp_path}: {message}\n"
    assert content(tmp_path) == before


def test_a_failed_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordexp.shipped.project.FOLDERS", ("configs", "configs/no/such"))
    with pytest.raises(FileNotFoundError):
        lay_out(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_found_from_any_folder_and_ones_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file("configs/stage1/prod.yaml") == configs() / "stage1" / "prod.yaml"
    assert load_run_config("configs/stage1/prod.yaml").swift["save_steps"] == 500
    for elsewhere in ("stage1/prod.yaml", tmp_path / "configs" / "stage1" / "prod.yaml", "configs/none.yaml"):
        assert recipe_file(elsewhere) == Path(elsewhere)
    check_recipes(read_study("configs/study/objectives.yaml"))
    stages = load_stages("configs/stages/demo.yaml").stages
    assert [stage.run for stage in stages] == [
        configs() / "demo" / "stage1.yaml", configs() / "stage2_two_channel" / "clean.yaml",
    ]  # fmt: skip
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("model: m\n")
    assert recipe_file("configs/mine.yaml") == Path("configs/mine.yaml")


def test_a_page_that_a_message_names_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runbook", "when_it_breaks"]) == 0
    assert capsys.readouterr().out == (configs().parent / "runbooks" / "when_it_breaks.md").read_text()
    assert main(["runbook", "nope"]) == 2
    assert "no runbook is called 'nope'; there are README, answer_forms" in capsys.readouterr().err
    assert project_files().keys() == FILES
