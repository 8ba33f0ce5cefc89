"""The stage-2 module lists: rules, identity, and agreement with the settings the losses read."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
from typing import Any

import pytest
from pydantic import ValidationError

from coordexp.config import checksum_of, load_run_config, parse_sections, pipeline_checksum
from coordexp.config.schema.pipeline import Pipeline
from coordexp.config.schema.stage2 import Schedule
from coordexp.errors import ConfigError
from coordexp.losses.modules import ObjectiveSpec
from coordexp.losses.stage1 import Stage1Weights

TOKEN_CE = {
    "desc_ce_weight": 1.0,
    "self_context_struct_ce_weight": 0.1,
    "rollout_fn_desc_weight": 1.0,
    "rollout_matched_prefix_struct_weight": 0.5,
    "rollout_drop_invalid_struct_ce_multiplier": 1.5,
}
BBOX_GEO = {"smoothl1_weight": 2.0, "ciou_weight": 0.2}
COORD_REG = {
    "coord_ce_weight": 0.1,
    "coord_el1_weight": 0.0,
    "coord_ehuber_weight": 0.0,
    "coord_huber_delta": 0.001,
    "coord_entropy_weight": 0.0,
    "coord_gate_weight": 0.5,
    "text_gate_weight": 0.1,
    "soft_ce_weight": 0.0,
    "self_context_soft_ce_weight": 0.05,
    "w1_weight": 0.0,
    "temperature": 1.0,
    "target_sigma": 2.0,
    "target_truncate": 16,
}


def module(name: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "enabled": True,
        "weight": 1.0,
        "channels": ["A", "B"],
        "config": dict(config),
        **changes,
    }


def pipeline(**changes: Any) -> dict[str, Any]:
    return {
        "objective": [
            module("token_ce", TOKEN_CE),
            module("bbox_geo", BBOX_GEO),
            module("coord_reg", COORD_REG),
        ],
        "diagnostics": [module("coord_diag", {})],
        **changes,
    }


def sections(**stage2: Any) -> dict[str, Any]:
    return {
        "stage2_ab": {"schedule": {"b_ratio": 0.5}, "pipeline": pipeline(), **stage2},
        "rollout_matching": {"backend": "hf"},
    }


def parsed(mapping: dict[str, Any]):
    return parse_sections(mapping, refuse_not_built=False)


def error_of(changed: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(sections(pipeline=changed))
    return str(caught.value)


def edited(path: list[Any], value: Any) -> dict[str, Any]:
    """The pipeline with one value replaced (or removed, for `...`)."""
    changed = copy.deepcopy(pipeline())
    here: Any = changed
    for part in path[:-1]:
        here = here[part]
    if value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return changed


def test_lists_keep_their_order_and_values() -> None:
    stage2 = parsed(sections()).stage2_ab
    assert stage2 is not None
    assert [entry.name for entry in stage2.pipeline.objective] == ["token_ce", "bbox_geo", "coord_reg"]
    assert stage2.pipeline.objective[1].config.model_dump() == BBOX_GEO
    assert stage2.schedule.b_ratio == 0.5


WRONG = {
    "unknown config key": (
        edited(["objective", 1, "config", "giou_weight"], 1.0),
        "stage2_ab.pipeline.objective[1].config.giou_weight in --coordexp: unknown key; did you mean "
        "stage2_ab.pipeline.objective[1].config.ciou_weight?",
    ),
    "missing config key": (
        edited(["objective", 0, "config", "desc_ce_weight"], ...),
        "stage2_ab.pipeline.objective[0].config.desc_ce_weight in --coordexp: is missing; it has no default.",
    ),
    "missing entry key": (
        edited(["objective", 2, "channels"], ...),
        "stage2_ab.pipeline.objective[2].channels in --coordexp: is missing; it has no default.",
    ),
    "negative weight": (
        edited(["objective", 1, "weight"], -1),
        "stage2_ab.pipeline.objective[1].weight = -1 in --coordexp: expected greater than or equal to 0.",
    ),
    "unknown module": (
        edited(["objective", 1, "name"], "bbox_goe"),
        'stage2_ab.pipeline.objective[1].name = "bbox_goe" in --coordexp: expected one of token_ce, bbox_geo, '
        'coord_reg (did you mean "bbox_geo"?).',
    ),
    "diagnostics module as objective": (
        edited(["objective", 1], module("coord_diag", {})),
        "expected one of token_ce, bbox_geo, coord_reg",
    ),
    "unknown channel": (
        edited(["objective", 0, "channels"], ["A", "C"]),
        'stage2_ab.pipeline.objective[0].channels[1] = "C" in --coordexp: expected one of A, B',
    ),
    "no channel": (edited(["objective", 0, "channels"], []), "stage2_ab.pipeline.objective[0].channels = []"),
    "channel twice": (edited(["objective", 0, "channels"], ["A", "A"]), "channels lists a channel twice."),
    "multiplier over 4": (
        edited(["objective", 0, "config", "rollout_drop_invalid_struct_ce_multiplier"], 4.5),
        "rollout_drop_invalid_struct_ce_multiplier = 4.5 in --coordexp: expected less than or equal to 4.",
    ),
    "module twice": (
        {"objective": [module("bbox_geo", BBOX_GEO)] * 2},
        "module bbox_geo is listed twice; one entry a module.",
    ),
    "coord_reg first": (
        {
            "objective": [
                module("token_ce", TOKEN_CE),
                module("coord_reg", COORD_REG),
                module("bbox_geo", BBOX_GEO),
            ]
        },
        "stage2_ab.pipeline in --coordexp: coord_reg stands before bbox_geo; list bbox_geo first.",
    ),
    "text gate without text": (
        {"objective": [module("token_ce", TOKEN_CE, channels=["B"]), module("coord_reg", COORD_REG)]},
        "text_gate_weight acts on rows that token_ce supervises, which is off in channel A",
    ),
    "multiplier that cannot act": (
        {"objective": [module("token_ce", TOKEN_CE, channels=["A"])]},
        "rollout_drop_invalid_struct_ce_multiplier acts in channel B, where token_ce is off; set it to 1.",
    ),
    "names of matched objects that nothing teaches": (
        {
            "objective": [
                module(
                    "token_ce",
                    TOKEN_CE
                    | {"rollout_drop_invalid_struct_ce_multiplier": 1, "rollout_matched_desc_weight": 0.5},
                    channels=["A"],
                )
            ]
        },
        "rollout_matched_desc_weight acts in channel B, where token_ce is off; set it to 0.",
    ),
}


@pytest.mark.parametrize(("changed", "expected"), WRONG.values(), ids=list(WRONG))
def test_rules_of_the_module_lists(changed: dict[str, Any], expected: str) -> None:
    assert expected in error_of(changed)


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same mappings with their keys in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        return dict(rng.sample(items, len(items)))
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


def two_channel_checksum(**stage2: Any) -> str | None:
    return checksum_of(parsed(sections(**stage2)), "stage2_two_channel")


def test_checksum_is_the_sha256_of_the_canonical_identity() -> None:
    settings = parsed(sections())
    assert settings.stage2_ab is not None
    extra = {
        "variant": "stage2_two_channel",
        "stage2_ab.coord_ctx_embed_mode": "soft",
        "stage2_ab.coord_decode_mode": "exp",
    }
    identity = {
        "objective": [
            module("token_ce", TOKEN_CE),
            module("bbox_geo", BBOX_GEO),
            module("coord_reg", {**COORD_REG, "target_truncate": 16.0}),
        ],
        "diagnostics": [module("coord_diag", {})],
        "extra": extra,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert pipeline_checksum(settings.stage2_ab.pipeline, extra) == expected
    assert checksum_of(settings, "stage2_two_channel") == expected


def test_an_option_at_its_default_is_no_part_of_the_checksum() -> None:
    key = ["objective", 0, "config", "rollout_matched_desc_weight"]
    assert two_channel_checksum(pipeline=edited(key, 0.0)) == two_channel_checksum()
    assert two_channel_checksum(pipeline=edited(key, 0.5)) != two_channel_checksum()


def test_checksum_does_not_see_key_order_number_form_or_run_context(tmp_path) -> None:
    expected = two_channel_checksum()
    for seed in range(5):
        mapping = shuffled(sections(), random.Random(seed))
        mapping["experiment"] = {"title": f"run {seed}"}
        mapping["custom"] = {"prompt": f"prompt {seed}"}
        assert checksum_of(parsed(mapping), "stage2_two_channel") == expected
    assert two_channel_checksum(pipeline=edited(["objective", 0, "weight"], 1)) == expected  # 1 and 1.0
    for name, seed in (("a", 1), ("b", 2)):
        file = tmp_path / f"{name}.yaml"
        content = {
            "training": {"seed": seed, "run_name": name, "output_dir": name},
            "custom": {"trainer_variant": "stage2_two_channel"},
            **sections(),
        }
        file.write_text(json.dumps(content))
        config = load_run_config(file, refuse_not_built=False)
        assert checksum_of(config.sections, config.variant) == expected


@pytest.mark.parametrize(
    "stage2",
    [
        {"coord_ctx_embed_mode": "st"},
        {"coord_decode_mode": "st"},
        {"pipeline": edited(["objective", 1, "config", "ciou_weight"], 0.3)},
        {"pipeline": edited(["objective", 1, "enabled"], False)},
        {"pipeline": edited(["objective", 1, "channels"], ["B"])},
        {"pipeline": edited(["diagnostics"], [])},
    ],
)
def test_checksum_sees_everything_semantic(stage2: dict[str, Any]) -> None:
    assert two_channel_checksum(**stage2) != two_channel_checksum()


def test_checksum_of_the_other_variants() -> None:
    aligned = {"rollout_matching": {"backend": "hf", "pipeline": pipeline()}}
    first = checksum_of(parsed(aligned), "stage2_rollout_aligned")
    aligned["rollout_matching"]["coord_decode_mode"] = "st"
    assert None not in (first, two_channel_checksum())
    assert len({first, checksum_of(parsed(aligned), "stage2_rollout_aligned"), two_channel_checksum()}) == 3
    assert checksum_of(parsed({}), "stage1_coord") is None


def test_sections_must_fit_the_variant(tmp_path) -> None:
    def message(content: dict[str, Any]) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError) as caught:
            load_run_config(file, refuse_not_built=False)
        return str(caught.value)

    assert "stage2_ab in" in message({**sections(), "custom": {"trainer_variant": "stage1_coord"}})
    two_channel = {"trainer_variant": "stage2_two_channel"}
    assert message({"custom": two_channel}) == (
        "2 problems:\n"
        "  stage2_ab: is missing; trainer variant stage2_two_channel needs it.\n"
        "  rollout_matching: is missing; trainer variant stage2_two_channel needs it."
    )
    both = sections()
    both["rollout_matching"]["pipeline"] = pipeline()
    assert "whose objective is stage2_ab.pipeline; remove it." in message({**both, "custom": two_channel})
    aligned = {"custom": {"trainer_variant": "stage2_rollout_aligned"}, "rollout_matching": {"backend": "hf"}}
    assert "rollout_matching.pipeline in" in message(aligned)


def test_the_losses_read_the_module_lists_as_they_were_written() -> None:
    written = pipeline()
    written["objective"][1] |= {"weight": 2.0, "channels": ["B"]}
    written["objective"][2]["enabled"] = False
    spec = ObjectiveSpec.from_pipeline(Pipeline.model_validate(written))
    for entry, own in zip(
        spec.objective + spec.diagnostics, [*written["objective"], *written["diagnostics"]], strict=True
    ):
        left_out: dict[str, Any] = {
            "coord_reg": {"target_sigma_per_side": None},
            "token_ce": {"rollout_matched_desc_weight": 0.0},
        }.get(entry.name, {})
        config = own["config"] | left_out
        assert dataclasses.asdict(entry) == own | {
            "channels": tuple(own["channels"]),
            "config": config,
            "warmup": {},
        }
    geo, reg = spec.objective[1:]
    assert [geo.weight_in(channel) for channel in "AB"] == [0.0, 2.0]
    assert reg.weight_in("B") == 0.0


def test_the_stage_1_section_holds_what_its_loss_reads_with_the_same_defaults() -> None:
    ours = parse_sections({}).custom.coord_soft_ce_w1.model_dump(exclude={"monitor_mass"})
    assert Stage1Weights.from_mapping(ours) == Stage1Weights()
    assert ours == dataclasses.asdict(Stage1Weights())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (1.5, "expected a number from 0 to 1, or points"),
        (True, "expected a number from 0 to 1, or points"),
        ("much", "expected a number from 0 to 1, or points"),
        (float("nan"), "expected a number from 0 to 1, or points"),
        ([], "holds no point"),
        ([[0, 0.1], [5, 2]], r"the number of \[5, 2\] is 2; expected a number from 0 to 1"),
        ([[5, 0.0], [5, 0.2]], r"steps of its points are \[5, 5\]"),
        ([[0.5, 0.1]], r"the step of \[0\.5, 0\.1\] is 0\.5"),
        ([0.1, 0.2], r"found 0\.1 for a point"),
    ],
)
def test_a_share_of_rollouts_that_is_none_is_refused(value, told) -> None:
    with pytest.raises(ValidationError, match=told):
        Schedule(b_ratio=value)


def test_a_share_of_rollouts_may_grow() -> None:
    assert Schedule(b_ratio=[[0, 0], [200, 0.5]]).b_ratio == [(0, 0.0), (200, 0.5)]
    assert Schedule(b_ratio=1).b_ratio == 1.0
