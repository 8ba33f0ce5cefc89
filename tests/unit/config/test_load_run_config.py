"""Both forms of a run file, `extends`, overrides, sources, and the ms-swift arguments that follow from ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordexp.config import DEFAULT_PROMPT, load_run_config, parse_sections, read_sections_file, sections_hash
from coordexp.errors import ConfigError

SECTIONED = """\
model: {model: weights, torch_dtype: float32}
template: {max_length: 512}
tuner: {freeze_vit: false}
training:
  max_steps: 100
  learning_rate: 1e-4
  output_dir: runs/a
  report_to: [tensorboard, wandb]
custom:
  train_jsonl: train.jsonl
  val_jsonl: val.jsonl
  object_ordering: random
  coord_soft_ce_w1: {ce_weight: 1.0, target_truncate: 8}
"""
FLAT = """\
external_plugins: [coordexp/plugin.py]
ignore_args_error: true
custom_trainer_variant: stage1_coord
coordexp:
  custom:
    object_ordering: random
    coord_soft_ce_w1: {ce_weight: 1.0, target_truncate: 8}
model: weights
torch_dtype: float32
dataset: [train.jsonl]
val_dataset: [val.jsonl]
freeze_vit: false
max_length: 512
max_steps: 100
learning_rate: 1.0e-4
output_dir: runs/b
report_to: [tensorboard, wandb]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_file


def test_a_data_file_may_lie_under_the_home_folder(write, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "data" / name).touch()
    sectioned = SECTIONED.replace("val_jsonl: val.jsonl", "val_jsonl: ~/data/*.jsonl")
    flat = FLAT.replace("[train.jsonl]", '["~/data/a.jsonl#50"]')
    found = load_run_config(write(sectioned, "a.yaml")).swift
    assert found["val_dataset"] == [f"{tmp_path}/data/a.jsonl", f"{tmp_path}/data/b.jsonl"]
    assert load_run_config(write(flat, "b.yaml")).swift["dataset"] == [f"{tmp_path}/data/a.jsonl#50"]


def test_both_forms_mean_the_same_run(write) -> None:
    sectioned, flat = load_run_config(write(SECTIONED, "a.yaml")), load_run_config(write(FLAT, "b.yaml"))
    same = {"model", "torch_dtype", "max_length", "freeze_vit", "max_steps", "learning_rate", "report_to"}
    for name in same | {"dataset", "val_dataset"}:
        assert sectioned.swift[name] == flat.swift[name], name
    assert sectioned.swift["learning_rate"] == 1e-4
    assert sectioned.custom.coord_soft_ce_w1 == flat.custom.coord_soft_ce_w1
    assert sectioned.variant == flat.variant == "stage1_coord"
    assert sectioned.config_hash == flat.config_hash  # output_dir is run context
    a, b = sectioned.to_swift_flat(), flat.to_swift_flat()
    assert {key: a[key] for key in a if key != "output_dir"} == {
        key: b[key] for key in b if key != "output_dir"
    }


def test_defaults_of_stage_1(write) -> None:
    custom = load_run_config(write("model: {model: m}\n")).custom
    assert custom.coord_soft_ce_w1.model_dump() == {
        "enabled": True,
        "soft_ce_weight": 1.0,
        "w1_weight": 1.0,
        "ce_weight": 0.0,
        "gate_weight": 0.0,
        "temperature": 1.0,
        "target_sigma": 2.0,
        "target_sigma_per_side": None,
        "target_truncate": None,
        "monitor_mass": True,
        "warmup": {},
    }
    assert (custom.object_field_order, custom.object_ordering) == ("desc_first", "sorted")
    assert custom.prompt == DEFAULT_PROMPT == "Detect all objects in the image."


def test_swift_argv_is_what_swift_sft_reads(write) -> None:
    argv = load_run_config(write(SECTIONED)).to_swift_argv()
    flags = {argv[i]: argv[i + 1] for i in range(len(argv) - 1) if argv[i].startswith("--")}
    assert flags["--max_steps"] == "100"
    assert flags["--learning_rate"] == "0.0001"
    assert flags["--freeze_vit"] == "false"
    assert flags["--dataset"] == "train.jsonl"
    assert flags["--ignore_args_error"] == "true"
    assert flags["--custom_trainer_variant"] == "stage1_coord"
    report_to = argv.index("--report_to")
    assert argv[report_to + 1 : report_to + 3] == ["tensorboard", "wandb"]
    plugin = Path(flags["--external_plugins"])
    assert plugin.is_file()
    assert plugin.parts[-2:] == ("coordexp", "plugin.py")
    assert json.loads(flags["--coordexp"]) == {
        "custom": {"object_ordering": "random", "coord_soft_ce_w1": {"ce_weight": 1.0, "target_truncate": 8}}
    }


def test_what_travels_to_the_plugin_gives_the_same_settings(write) -> None:
    config = load_run_config(write(SECTIONED))
    arrived = parse_sections(config.to_swift_flat()["coordexp"])
    own_data = {"train_jsonl", "val_jsonl", "trainer_variant"}
    assert arrived.custom.model_dump(exclude=own_data) == config.custom.model_dump(exclude=own_data)


def test_an_argument_left_null_is_not_passed(write) -> None:
    config = load_run_config(write("model: {model: m}\ntraining: {resume_from_checkpoint: null}\n"))
    assert "--resume_from_checkpoint" not in config.to_swift_argv()


def test_extends_merges_mappings_and_replaces_the_rest(write) -> None:
    write(
        "model: m\nreport_to: [a, b]\ncoordexp: {custom: {object_ordering: random, head: plain}}\nseed: 1\n",
        "base.yaml",
    )
    child = write("extends: base.yaml\nreport_to: [c]\ncoordexp: {custom: {head: auto}}\n", "child.yaml")
    config = load_run_config(child)
    assert config.swift["report_to"] == ["c"]
    assert (config.custom.object_ordering, config.custom.head) == ("random", "auto")
    assert config.sources["seed"].endswith("base.yaml:4")
    assert config.sources["report_to"].endswith("child.yaml:2")
    assert config.sources["custom.head"].endswith("child.yaml:3")
    assert config.sources["custom.object_ordering"].endswith("base.yaml:3")


def test_extends_goes_over_several_files(write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write("model: m\nseed: 1\nmax_steps: 1\nlearning_rate: 1e-4\n", "root.yaml")
    write("extends: ../root.yaml\nseed: 2\nmax_steps: 2\n", "sub/middle.yaml")
    config = load_run_config(write("extends: sub/middle.yaml\nseed: 3\n", "child.yaml"))
    assert {key: config.swift[key] for key in ("model", "learning_rate", "max_steps", "seed")} == {
        "model": "m",
        "learning_rate": 1e-4,
        "max_steps": 2,
        "seed": 3,
    }
    assert [Path(config.sources[key]).name for key in ("model", "max_steps", "seed")] == [
        "root.yaml:1",
        "middle.yaml:3",
        "child.yaml:2",
    ]


def test_files_that_extend_each_other_are_refused(write) -> None:
    write("extends: b.yaml\nmodel: m\n", "a.yaml")
    write("extends: c.yaml\n", "b.yaml")
    circle = write("extends: a.yaml\n", "c.yaml")
    with pytest.raises(ConfigError, match=r"in a circle: c\.yaml -> a\.yaml -> b\.yaml -> c\.yaml"):
        load_run_config(circle)
    with pytest.raises(ConfigError, match=r"in a circle: own\.yaml -> own\.yaml"):
        load_run_config(write("extends: own.yaml\n", "own.yaml"))


def test_the_base_is_found_beside_the_file_that_extends_it(write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write("model: m\nseed: 7\n", "base.yaml")
    assert load_run_config(write("extends: ../base.yaml\n", "sub/child.yaml")).swift["seed"] == 7


def test_overrides_win_over_the_file_and_say_so(write) -> None:
    argv = ["--max_steps", "3", "--bf16", "--report_to", "none", "--dataset", "x.jsonl", "y.jsonl"]
    argv += ["--learning_rate=2e-5"]
    argv += [
        "--set",
        "custom.coord_soft_ce_w1.enabled=false",
        "--set",
        "training.seed=9",
        "--set",
        "weight_decay=0.5",
    ]
    argv += ["--set", "custom.prompt=Find: all", "--max_steps", "4"]
    config = load_run_config(write(FLAT), argv)
    swift = config.swift
    assert (swift["max_steps"], swift["bf16"], swift["report_to"]) == (4, True, ["none"])
    assert (swift["dataset"], swift["learning_rate"]) == (["x.jsonl", "y.jsonl"], 2e-5)
    assert (swift["seed"], swift["weight_decay"]) == (9, 0.5)
    assert not config.custom.coord_soft_ce_w1.enabled
    assert config.custom.prompt == "Find: all"
    for path in ("max_steps", "dataset", "seed", "custom.coord_soft_ce_w1.enabled", "custom.prompt"):
        assert config.sources[path] == "command line"
    assert config.custom.coord_soft_ce_w1.ce_weight == 1.0  # the rest of the section stays
    assert config.sources["custom.coord_soft_ce_w1.ce_weight"].endswith("run.yaml:7")


def test_sections_can_be_replaced_as_a_whole(write, tmp_path: Path) -> None:
    as_json = load_run_config(write(FLAT), ["--coordexp", '{"custom": {"head": "plain"}}'])
    assert (as_json.custom.head, as_json.custom.object_ordering) == ("plain", "sorted")
    write("custom:\n  object_field_order: geometry_first\n", "ours.yaml")
    from_file = load_run_config(write(FLAT), ["--coordexp_config", str(tmp_path / "ours.yaml")])
    assert from_file.custom.object_field_order == "geometry_first"
    assert from_file.sources["custom.object_field_order"].endswith("ours.yaml:2")


def test_a_list_item_can_be_overridden(write) -> None:
    file = write("""\
custom: {trainer_variant: stage2_two_channel}
rollout_matching:
  vllm: {mode: server, server: {servers: [{base_url: a}, {base_url: b}]}}
stage2_ab:
  schedule: {b_ratio: 1}
  pipeline:
    objective:
    - {name: bbox_geo, enabled: true, weight: 1, channels: [A], config: {smoothl1_weight: 1, ciou_weight: 0}}
""")
    argv = ["--set", "rollout_matching.vllm.server.servers[1].base_url=c"]
    config = load_run_config(file, argv, refuse_not_built=False)
    assert config.rollout_matching is not None
    assert config.rollout_matching.vllm.server is not None
    assert [server.base_url for server in config.rollout_matching.vllm.server.servers] == ["a", "c"]
    with pytest.raises(ConfigError, match=r"servers\[2\].* on the command line: found a list of 2"):
        load_run_config(file, ["--set", "rollout_matching.vllm.server.servers[2].base_url=c"])


@pytest.mark.parametrize(
    ("size", "per_device", "world_size", "steps"), [(32, 4, 1, 8), (32, 4, 8, 1), (12, 2, 3, 2), (7, 1, 7, 1)]
)
def test_accumulation_steps_follow_from_the_effective_batch(
    write, size: int, per_device: int, world_size: int, steps: int
) -> None:
    text = f"training: {{effective_batch_size: {size}, per_device_train_batch_size: {per_device}}}\n"
    config = load_run_config(write(text), world_size=world_size)
    assert config.swift["gradient_accumulation_steps"] == steps
    assert config.effective_batch_size == size == steps * per_device * world_size


def test_accumulation_steps_that_contradict_the_effective_batch(write) -> None:
    text = "training:\n  effective_batch_size: 8\n  gradient_accumulation_steps: 4\n"
    with pytest.raises(ConfigError, match=r"makes gradient_accumulation_steps 8, but .* is 4 \(.*:3\)"):
        load_run_config(write(text), world_size=1)
    assert load_run_config(write(text), world_size=2).effective_batch_size == 8


def test_world_size_comes_from_the_environment(write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("ENV: {NPROC_PER_NODE: '4'}\nmodel: {model: m}\ntraining: {effective_batch_size: 8}\n")
    for name in ("WORLD_SIZE", "NPROC_PER_NODE", "NNODES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = load_run_config(file)
    assert (config.env, config.world_size) == ({"NPROC_PER_NODE": "4"}, 4)
    monkeypatch.setenv("NNODES", "2")
    assert load_run_config(file).world_size == 8
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    assert load_run_config(file).world_size == 2
    monkeypatch.setenv(
        "WORLD_SIZE", "8"
    )  # of a cluster, which may count nodes; the ranks are to be started yet
    assert load_run_config(file).world_size == 2
    monkeypatch.setenv("LOCAL_RANK", "0")  # one of the ranks
    assert load_run_config(file).world_size == 8
    monkeypatch.setenv("WORLD_SIZE", "gpu")
    with pytest.raises(ConfigError, match="environment variable WORLD_SIZE = 'gpu': expected a number"):
        load_run_config(file)


def test_global_max_length_and_deepspeed_become_arguments(write) -> None:
    text = "global_max_length: 900\ndeepspeed: {config: zero2}\nmodel: {model: m}\n"
    config = load_run_config(write(text))
    assert (config.swift["max_length"], config.swift["deepspeed"]) == (900, "zero2")
    assert config.sources["max_length"].endswith("run.yaml:1 (global_max_length)")
    off = load_run_config(write("deepspeed: {enabled: false, config: zero2}\nmodel: {model: m}\n"))
    assert "deepspeed" not in off.swift
    assert "deepspeed" not in load_run_config(write("deepspeed: {enabled: false}\nmodel: {model: m}\n")).swift
    with pytest.raises(ConfigError, match=r"deepspeed in .*: config is missing; give a name such as zero2"):
        load_run_config(write("deepspeed: {}\nmodel: {model: m}\n"))
    assert load_run_config(write("deepspeed: zero3\nmodel: {model: m}\n")).swift["deepspeed"] == "zero3"


def test_variant_alias_is_spelt_out(write) -> None:
    assert load_run_config(write("custom: {trainer_variant: stage1}\n")).variant == "stage1_coord"
    assert load_run_config(write(FLAT), ["--custom_trainer_variant", "stage1"]).variant == "stage1_coord"


def test_a_sections_file_knows_its_lines(write) -> None:
    sections = read_sections_file(write("custom:\n  head: plain\n"))
    assert sections.custom.head == "plain"
    with pytest.raises(ConfigError, match=r"custom\.head = \"fast\" in .*run\.yaml:2: expected one of"):
        read_sections_file(write("custom:\n  head: fast\n"))


def test_sections_hash_ignores_notes(write) -> None:
    plain = parse_sections({"custom": {"head": "plain"}})
    noted = parse_sections({"custom": {"head": "plain"}, "experiment": {"title": "first try"}})
    assert sections_hash(plain) == sections_hash(noted)
    assert sections_hash(plain) != sections_hash(parse_sections({}))


@pytest.mark.parametrize("text", ["", "{}\n", "# only a comment\n"])
def test_an_empty_file_is_no_run(write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: is empty"):
        load_run_config(write(text), ["--max_steps", "3"])


def test_anchors_and_merge_keys_work(write) -> None:
    text = "model: m\ncoordexp:\n  custom: &c\n    head: plain\n  experiment: {title: &t x, notes: *t}\nseed: 3\n"
    config = load_run_config(write(text))
    assert (config.custom.head, config.experiment.notes) == ("plain", "x")


def test_a_long_sample_may_stop_the_run(write) -> None:
    """ms-swift spells it delete with strict: true."""
    for text in ("template: {truncation_strategy: raise}\n", "model: m\ntruncation_strategy: raise\n"):
        swift = load_run_config(write(text)).swift
        assert (swift["truncation_strategy"], swift["strict"]) == ("delete", True)
    text = "template: {truncation_strategy: raise}\ndata: {strict: false}\n"
    with pytest.raises(
        ConfigError, match=r"data\.strict = false in .*: truncation_strategy: raise stops the run"
    ):
        load_run_config(write(text))


def test_when_to_save_reaches_the_trainer(write) -> None:
    sectioned = write("training: {save_delay_steps: 100, save_last_epoch: true, max_steps: 200}\n", "a.yaml")
    flat = write(
        "max_steps: 200\ncoordexp: {training: {save_delay_steps: 100, save_last_epoch: true}}\n", "b.yaml"
    )
    for file in (sectioned, flat):
        sent = load_run_config(file).to_swift_flat()["coordexp"]["training"]
        assert sent == {"save_delay_steps": 100, "save_last_epoch": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"model: &a [*a]\n", "run.yaml:1: a value holds itself by an alias"),
        (b"model: m\n? [a]\n: b\n", "run.yaml:2: a key is a sequence; expected text"),
        (b"1: 2\n", "run.yaml:1: key '1' is not text; put it in quotes"),
        (b"a: [1\n", "run.yaml is not valid YAML"),
        (b"- a\n", "expected a mapping of settings, found list"),
        (b"x: !!python/object:os.system 1\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_run_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "run.yaml")
    assert said in str(caught.value)
