"""Directories that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.errors import ConfigError
from coordexp.models.staging import is_up_to_date, staged_directory, write_stamp


def _tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def _write_half_and_fail(output_dir: Path) -> None:
    with staged_directory(output_dir, replace=True) as staging_dir:
        (staging_dir / "new.txt").write_text(f"{1 / 0}")


def test_directory_appears_when_the_block_ends(tmp_path):
    with staged_directory(tmp_path / "a" / "out") as staging_dir:
        (staging_dir / "x.txt").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert _tree(tmp_path) == {"a/out/x.txt": "1"}


def test_an_error_leaves_no_trace_and_keeps_the_old_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError):
        _write_half_and_fail(tmp_path / "out")
    assert _tree(tmp_path) == {"out/old.txt": "old"}


def test_replace_swaps_the_whole_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with staged_directory(tmp_path / "out", replace=True) as staging_dir:
        (staging_dir / "new.txt").write_text("new")
    assert _tree(tmp_path) == {"out/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging_dir:
        (staging_dir / "x.txt").write_text("1")
    assert _tree(tmp_path) == {"out/x.txt": "1"}


def test_filled_directories_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"), staged_directory(tmp_path / "file"):
        pass
    with pytest.raises(ConfigError, match="not empty"), staged_directory(tmp_path):
        pass


def test_mode_is_that_of_an_ordinary_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_stamp_compares_values_as_json_and_names_what_differs(tmp_path):
    assert is_up_to_date(tmp_path, "s.json", {"seed": 0}) is False
    write_stamp(tmp_path, "s.json", {"seed": 0, "kinds": ("box",)})
    assert is_up_to_date(tmp_path, "s.json", {"kinds": ["box"], "seed": 0}) is True
    with pytest.raises(ConfigError, match=r"extra: None there, 1 asked for; seed: 0 there, 2 asked for"):
        is_up_to_date(tmp_path, "s.json", {"kinds": ["box"], "seed": 2, "extra": 1})
