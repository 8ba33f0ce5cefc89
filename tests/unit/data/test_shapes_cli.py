"""`coordexp data shapes` from its arguments to files and exit codes."""

from __future__ import annotations

import argparse
import json

import pytest

from coordexp.cli.assets import data_cmd
from coordexp.data.shapes import PRESETS
from coordexp.errors import ConfigError


def _run(*argv: object) -> int:
    parser = argparse.ArgumentParser(prog="coordexp")
    data_cmd.add_parser(parser.add_subparsers())
    return data_cmd.run(parser.parse_args(["data", *map(str, argv)]))


def test_flags_override_the_preset(tmp_path, capsys):
    scene = ["--image-size", "96x48", "--kinds", "box, circle", "--colors", "red", "--max-side", "20"]
    argv = ["shapes", "--output", tmp_path / "s", "--train", 5, "--val", 2, "--seed", 3, *scene,
            "--plain-background"]  # fmt: skip
    assert _run(*argv) == 0
    assert capsys.readouterr().out.strip() == f"wrote 5 train and 2 val scenes in {tmp_path / 's'}"
    records = [json.loads(line) for line in (tmp_path / "s" / "train.jsonl").read_text().splitlines()]
    assert len(records) == 5
    assert {(r["width"], r["height"]) for r in records} == {(96, 48)}
    assert {o["desc"] for r in records for o in r["objects"]} <= {"red box", "red circle"}
    assert _run(*argv) == 0
    assert capsys.readouterr().out.startswith("up to date: 5 train")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_can_be_chosen(tmp_path, preset):
    assert _run("shapes", "--output", tmp_path / "s", "--train", 2, "--val", 1, "--preset", preset) == 0
    record = json.loads((tmp_path / "s" / "val.jsonl").read_text())
    assert record["width"] == PRESETS[preset].width


def test_bad_values_exit_with_2_and_write_nothing(tmp_path, capsys):
    with pytest.raises(ConfigError, match="kinds = star") as error:
        _run("shapes", "--output", tmp_path / "s", "--kinds", "star")
    assert error.value.exit_code == 2
    with pytest.raises(SystemExit, match="2"):
        _run("shapes", "--output", tmp_path / "s", "--image-size", "64x")
    assert "'64x': expected a number of pixels or WIDTHxHEIGHT" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
