"""Every mistake ends in one clear error before anything is written: what, where, what was expected, what to do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.processes import run_swift, sft_flags
from support.stage2 import two_channel

from coordexp.errors import ConfigError, CoordExpError, RecordError
from coordexp.models.tiny import build_tiny_model
from coordexp.trainers.activate import activate_from_argv
from coordexp.trainers.runtime import active


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that a test may damage."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


@pytest.fixture(autouse=True)
def as_swift_sft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])


def edit_line(file: Path, line: int, change) -> None:
    """Replace a 1-based line by `change(record)`: a record to serialise, or text as it is."""
    lines = file.read_text().splitlines()
    changed = change(json.loads(lines[line - 1]))
    lines[line - 1] = changed if isinstance(changed, str) else json.dumps(changed)
    file.write_text("\n".join(lines) + "\n")


def refused(error: type[CoordExpError], *fragments: str, argv: list[str]) -> None:
    with pytest.raises(error) as caught:
        activate_from_argv(argv)
    for fragment in fragments:
        assert fragment in str(caught.value)


def with_object(**changes):
    def change(record: dict) -> dict:
        obj = {**record["objects"][0], **changes}
        return {
            **record,
            "objects": [{k: v for k, v in obj.items() if v is not None}, *record["objects"][1:]],
        }

    return change


BAD_RECORDS = {
    "coordinate 1000": (with_object(bbox_2d=[1, 2, 3, 1000]), ("object 0", "1000", "0..999")),
    "two geometries": (with_object(poly=[1, 2, 3, 4, 5, 6]), ("object 0", "bbox_2d", "poly")),
    "empty desc": (with_object(desc=""), ("object 0", "desc")),
    "truncated JSON line": (lambda record: json.dumps(record)[:40], ("JSON",)),
    "missing image": (
        lambda record: {**record, "images": ["images/train/gone.png"]},
        ("images/train/gone.png",),
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_names_file_and_line(nano_model: Path, data: Path, tmp_path: Path, name: str):
    change, fragments = BAD_RECORDS[name]
    edit_line(data / "train.jsonl", 3, change)
    argv = sft_flags(nano_model, data, tmp_path / "out")
    refused(RecordError, f"{data / 'train.jsonl'}:3", *fragments, argv=argv)
    assert not (tmp_path / "out").exists()


def test_unknown_variant_lists_the_known_ones(nano_model: Path, data: Path, tmp_path: Path):
    argv = sft_flags(nano_model, data, tmp_path / "out", custom_trainer_variant="stage1_cord")
    refused(ConfigError, "stage1_cord", "stage1_coord", argv=argv)


def test_misspelt_flags_are_named_with_the_nearest_valid_one(nano_model: Path, data: Path, tmp_path: Path):
    argv = sft_flags(nano_model, data, tmp_path / "out", learning_rat="1e-3", custom_trainer_varient="x")
    refused(
        ConfigError,
        "--learning_rat: did you mean --learning_rate?",
        "--custom_trainer_varient: did you mean --custom_trainer_variant?",
        argv=argv,
    )


def test_misspelt_setting_is_named_with_its_dotted_path(nano_model: Path, data: Path, tmp_path: Path):
    settings = json.dumps({"custom": {"coord_soft_ce_w1": {"w1_wieght": 1}}})
    argv = sft_flags(nano_model, data, tmp_path / "out", coordexp=settings)
    refused(ConfigError, "custom.coord_soft_ce_w1.w1_wieght", "w1_weight", argv=argv)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("sequence_parallel_size", 2), ("streaming", True)],
)
def test_what_the_trainer_does_not_handle_is_refused(
    nano_model: Path, data: Path, tmp_path: Path, flag, value
):
    argv = sft_flags(nano_model, data, tmp_path / "out", **{flag: value})
    refused(ConfigError, f"--{flag}", "not built yet", argv=argv)


@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_packing_of_ms_swift_without_flash_attention_says_what_to_write(nano_model, data, tmp_path, flag):
    argv = sft_flags(nano_model, data, tmp_path / "out", **{flag: True})
    refused(ConfigError, f"--{flag} = true", "flash attention only", "{training: {packing: true}}", argv=argv)


def test_samples_left_out_in_silence_are_refused(nano_model: Path, data: Path, tmp_path: Path):
    argv = sft_flags(nano_model, data, tmp_path / "out", lazy_tokenize=False, strict=None)
    refused(ConfigError, "--lazy_tokenize = false", "leaves out in silence what it cannot encode", argv=argv)


def test_one_file_with_two_limits(nano_model: Path, data: Path, tmp_path: Path):
    settings = json.dumps({"debug": {"train_sample_limit": 2}})
    argv = sft_flags(nano_model, data, tmp_path / "out", coordexp=settings, val_dataset=data / "train.jsonl")
    refused(ConfigError, "is both dataset and val_dataset", "found 2 and None", argv=argv)


def test_words_that_belong_to_no_flag_are_named(nano_model: Path, data: Path, tmp_path: Path):
    argv = [*sft_flags(nano_model, data, tmp_path / "out"), "-x"]
    refused(ConfigError, "-x", argv=argv)


def test_settings_that_are_no_json(nano_model: Path, data: Path, tmp_path: Path):
    argv = sft_flags(nano_model, data, tmp_path / "out", coordexp="{custom:")
    refused(ConfigError, "--coordexp", "JSON", argv=argv)


def test_tokenizer_without_coordinate_tokens_says_how_to_add_them(data: Path, tmp_path: Path):
    build_tiny_model(tmp_path / "plain", preset="nano", coord_tokens=False)
    argv = sft_flags(tmp_path / "plain", data, tmp_path / "out")
    refused(ConfigError, "<|coord_0|>", "coordexp model add-coord-tokens", argv=argv)


def test_dataset_that_does_not_exist(nano_model: Path, data: Path, tmp_path: Path):
    argv = sft_flags(nano_model, data, tmp_path / "out", dataset=data / "nowhere.jsonl")
    refused(ConfigError, "nowhere.jsonl", argv=argv)


@pytest.mark.slow
def test_swift_sft_exits_with_2_and_writes_nothing(nano_model: Path, data: Path, tmp_path: Path):
    edit_line(data / "train.jsonl", 2, with_object(bbox_2d=[1, 2, 3, 1000]))
    done = run_swift("sft", *sft_flags(nano_model, data, tmp_path / "out"))
    assert done.returncode == 2
    assert f"coordexp: {data / 'train.jsonl'}:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_settings_may_stand_in_a_file(nano_model: Path, data: Path, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("custom:\n  object_field_order: geometry_first\n  coord_soft_ce_w1: {w1_weight: 3.0}\n")
    activate_from_argv(sft_flags(nano_model, data, tmp_path / "out", coordexp_config=file))
    custom = active().sections.custom
    assert (custom.object_field_order, custom.coord_soft_ce_w1.w1_weight) == ("geometry_first", 3.0)
    both = sft_flags(nano_model, data, tmp_path / "out", coordexp_config=file, coordexp="{}")
    refused(ConfigError, "--coordexp and --coordexp_config are both given", argv=both)


def test_dotted_flags_lie_over_settings_of_either_kind(nano_model: Path, data: Path, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("custom:\n  coord_soft_ce_w1: {w1_weight: 3.0, ce_weight: 1.0}\n")
    dotted = [
        "--custom.coord_soft_ce_w1.ce_weight",
        "0.5",
        "--debug.train_sample_limit=4",
        "--custom.head",
        "plain",
    ]
    for settings in ({"coordexp_config": file}, {"coordexp": '{"custom": {}}'}, {}):
        activate_from_argv([*sft_flags(nano_model, data, tmp_path / "out", **settings), *dotted])
        sections = active().sections
        assert sections.custom.coord_soft_ce_w1.ce_weight == 0.5
        assert sections.custom.coord_soft_ce_w1.w1_weight == (3.0 if "coordexp_config" in settings else 1.0)
        assert (sections.custom.head, sections.debug.train_sample_limit) == ("plain", 4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--custom.hed", "plain"], "custom.hed on the command line: unknown key; did you mean custom.head?"),
        (["--rolout_matching.max_new_tokens", "3"], "did you mean --rollout_matching.max_new_tokens?"),
        (["--rollout_matching.backend", "hf"], "has no effect with trainer variant stage1_coord"),
    ],
)
def test_wrong_dotted_flags(nano_model: Path, data: Path, tmp_path: Path, flags: list[str], said: str):
    refused(ConfigError, said, argv=[*sft_flags(nano_model, data, tmp_path / "out"), *flags])


@pytest.mark.slow
def test_plain_swift_sft_trains_by_dotted_flags(nano_model: Path, data: Path, tmp_path: Path):
    """Every setting that a two-channel run needs beside its objective, as flags."""
    flags = sft_flags(
        nano_model, data, tmp_path / "run", max_steps=2, per_device_train_batch_size=2, eval_strategy="no",
        custom_trainer_variant="stage2_two_channel",
        coordexp=json.dumps({"stage2_ab": {"pipeline": two_channel(0.0)["stage2_ab"]["pipeline"]}}),
    )  # fmt: skip
    dotted = ["--stage2_ab.schedule.b_ratio", "0.5", "--rollout_matching.backend", "hf"]
    dotted += ["--rollout_matching.max_new_tokens", "24", "--rollout_matching.packing_length=320"]
    done = run_swift("sft", *flags, *dotted)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    resolved = json.loads((tmp_path / "run" / "resolved_config.json").read_text())
    assert resolved["stage2_ab"]["schedule"] == {"b_ratio": 0.5}
    assert resolved["rollout_matching"]["max_new_tokens"] == 24
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]]
    channels = [r["metrics"]["stage2/channel_b"] for r in records if "stage2/channel_b" in r["metrics"]]
    assert channels == [0.0, 1.0]
    longest = [
        r["metrics"]["rollout/gen_new_tokens_p99"] for r in records if "stage2/raw_rollouts" in r["metrics"]
    ]
    assert max(longest) <= 24
