"""`coordexp model tiny` and `coordexp model add-coord-tokens` from arguments to files."""

from __future__ import annotations

import argparse

import pytest
from transformers import AutoTokenizer

from coordexp.cli.assets import model_cmd
from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ConfigError
from coordexp.models.tiny import PRESETS


def _run(*argv: object) -> int:
    parser = argparse.ArgumentParser(prog="coordexp")
    model_cmd.add_parser(parser.add_subparsers())
    return model_cmd.run(parser.parse_args(["model", *map(str, argv)]))


def test_a_model_without_coordinate_tokens_gets_them(tmp_path, capsys):
    plain, expanded = tmp_path / "plain", tmp_path / "expanded"
    assert _run("tiny", "--output", plain, "--preset", "nano", "--no-coord-tokens") == 0
    assert _run("add-coord-tokens", "--model", plain, "--output", expanded) == 0
    assert CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(expanded)).bin_of(0) is None
    assert _run("add-coord-tokens", "--model", plain, "--output", expanded) == 0
    assert _run("add-coord-tokens", "--model", expanded, "--output", tmp_path / "again") == 0
    # DeepSpeed, if it is imported here for the first time, says before what it runs on.
    assert capsys.readouterr().out.splitlines()[-4:] == [
        f"wrote tiny Qwen3-VL (nano) in {plain}",
        f"added 1000 coordinate tokens; wrote {expanded}",
        f"up to date: {expanded}",
        f"nothing to do: {expanded} already holds all coordinate tokens; use it as it is",
    ]


def test_tokenizer_can_be_trained_on_a_file(tmp_path):
    (tmp_path / "corpus.txt").write_text("zyzzyva zyzzyva\n" * 5, encoding="utf-8")
    assert (
        _run("tiny", "--output", tmp_path / "m", "--preset", "nano", "--corpus", tmp_path / "corpus.txt") == 0
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m").encode("zyzzyva")) == 1
    with pytest.raises(ConfigError, match=r"--corpus .*none\.txt: no such file"):
        _run("tiny", "--output", tmp_path / "n", "--corpus", tmp_path / "none.txt")


def test_presets_of_the_command_line_are_those_of_the_builder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        _run("tiny", "--output", tmp_path / "m", "--preset", "huge")
    message = capsys.readouterr().err
    assert all(name in message for name in PRESETS)
