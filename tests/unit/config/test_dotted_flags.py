"""Settings of ours as flags and keys with dots: for the launcher, for the plugin, over what the other places say."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config import load_run_config
from coordexp.config.run.dotted import DottedFlag, sections_of_flags, split_dotted
from coordexp.errors import ConfigError


def test_dotted_flags_are_taken_out_of_a_command_line() -> None:
    argv = [
        "--model", "m", "--stage2_ab.schedule.b_ratio", "0.5", "--rollout_matching.decoding.top_k", "-1",
        "--custom.token_type_metrics.include", "a", "b", "--dataset", "x", "y", "--custom.head=plain",
        "--debug.enabled", "--debug", "z", "--not_ours.key", "1",
    ]  # fmt: skip
    dotted, rest = split_dotted(argv)
    assert rest == ["--model", "m", "--dataset", "x", "y", "--debug", "z", "--not_ours.key", "1"]
    assert [(flag.name, flag.value) for flag in dotted] == [
        ("stage2_ab.schedule.b_ratio", 0.5),
        ("rollout_matching.decoding.top_k", -1),
        ("custom.token_type_metrics.include", ["a", "b"]),
        ("custom.head", "plain"),
        ("debug.enabled", True),
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("1e-4",), 1e-4),
        (("null",), None),
        (("{temperature: 0.5}",), {"temperature": 0.5}),
        (("a: b",), "a: b"),
    ],
)
def test_values_are_read_as_yaml(values: tuple[str, ...], expected: object) -> None:
    assert DottedFlag("custom.prompt", values).value == expected


def test_paths_may_hold_an_index() -> None:
    flag = DottedFlag("stage2_ab.pipeline.objective[0].weight", ("0.5",))
    assert flag.path == ("stage2_ab", "pipeline", "objective", 0, "weight")


FLAGS = [DottedFlag("custom.head", ("plain",)), DottedFlag("custom.coord_soft_ce_w1.ce_weight", ("2",))]


def test_flags_stand_alone_or_lie_over_the_settings(tmp_path: Path) -> None:
    alone = sections_of_flags(None, None, FLAGS).custom
    assert (alone.head, alone.coord_soft_ce_w1.ce_weight) == ("plain", 2.0)
    given = {"custom": {"head": "fused", "coord_soft_ce_w1": {"w1_weight": 3.0}}}
    (tmp_path / "settings.yaml").write_text("custom: {head: fused, coord_soft_ce_w1: {w1_weight: 3.0}}\n")
    for sections, file in ((given, None), (None, str(tmp_path / "settings.yaml"))):
        custom = sections_of_flags(sections, file, FLAGS).custom
        assert (custom.head, custom.coord_soft_ce_w1.ce_weight, custom.coord_soft_ce_w1.w1_weight) == (
            "plain",
            2.0,
            3.0,
        )
    assert given == {"custom": {"head": "fused", "coord_soft_ce_w1": {"w1_weight": 3.0}}}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            DottedFlag("custom.head", ("plane",)),
            'custom.head = "plane" on the command line: expected one of auto,',
        ),
        (
            DottedFlag("custom.hed", ("plain",)),
            "custom.hed on the command line: unknown key; did you mean custom.head?",
        ),
        (
            DottedFlag("custom.train_jsonl", ("a",)),
            "custom.train_jsonl on the command line: has no effect here; write",
        ),
        (DottedFlag("training.max_steps", ("3",)), "has no effect here; write max_steps at the top level"),
        (
            DottedFlag("custom.head.deep", ("3",)),
            "custom.head.deep on the command line: custom.head is not a mapping",
        ),
    ],
)
def test_wrong_flags_are_named(flag: DottedFlag, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sections_of_flags({"custom": {"head": "plain"}}, None, [flag])
    assert said in str(caught.value)


def test_the_launcher_takes_the_same_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ncoordexp: {custom: {head: fused, object_ordering: random}}\n")
    config = load_run_config(
        file, ["--custom.head", "plain", "--training.seed", "3", "--custom.coord_soft_ce_w1.enabled", "false"]
    )
    assert (config.custom.head, config.custom.object_ordering, config.swift["seed"]) == ("plain", "random", 3)
    assert config.custom.coord_soft_ce_w1.enabled is False
    assert config.sources["custom.head"] == "command line"


def test_the_flat_form_takes_dotted_keys(tmp_path: Path) -> None:
    """`swift sft FILE` turns them into the flags above."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ncustom.head: plain\ncoordexp: {custom: {head: fused, object_ordering: random}}\n"
    )
    config = load_run_config(file)
    assert (config.custom.head, config.custom.object_ordering) == ("plain", "random")
    assert config.sources["custom.head"] == f"{file}:2"
