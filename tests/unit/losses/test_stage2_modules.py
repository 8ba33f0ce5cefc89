"""The stage-2 module lists: what is accepted, and what each mistake is told."""

from __future__ import annotations

import copy

import pytest

from coordexp.errors import ConfigError
from coordexp.losses.modules import BboxGeo, ObjectiveSpec

TOKEN_CE = {
    "desc_ce_weight": 1.0,
    "self_context_struct_ce_weight": 0.1,
    "rollout_fn_desc_weight": 1.0,
    "rollout_matched_prefix_struct_weight": 1.0,
    "rollout_drop_invalid_struct_ce_multiplier": 1.0,
}
BBOX_GEO = {"smoothl1_weight": 1.0, "ciou_weight": 0.5}
COORD_REG = {
    "coord_ce_weight": 0.0,
    "coord_el1_weight": 0.0,
    "coord_ehuber_weight": 0.0,
    "coord_huber_delta": 0.05,
    "coord_entropy_weight": 0.0,
    "coord_gate_weight": 0.0,
    "text_gate_weight": 0.0,
    "soft_ce_weight": 0.1,
    "self_context_soft_ce_weight": 0.0,
    "w1_weight": 0.1,
    "temperature": 1.0,
    "target_sigma": 2.0,
    "target_truncate": None,
}


def entry(name, config, **changes):
    return {
        "name": name,
        "enabled": True,
        "weight": 1.0,
        "channels": ["A", "B"],
        "config": dict(config),
    } | changes


def objective():
    return [entry("token_ce", TOKEN_CE), entry("bbox_geo", BBOX_GEO), entry("coord_reg", COORD_REG)]


def diagnostics():
    return [entry("coord_diag", {})]


def test_a_complete_list_is_read_into_typed_settings():
    spec = ObjectiveSpec.from_mappings(objective(), diagnostics())
    assert [module.name for module in spec.objective] == ["token_ce", "bbox_geo", "coord_reg"]
    assert spec.objective[1].config == BboxGeo(smoothl1_weight=1.0, ciou_weight=0.5)
    assert spec.diagnostics[0].weight_in("A") == 1.0


def test_weight_in_a_channel():
    geo = entry("bbox_geo", BBOX_GEO, weight=2.0, channels=["B"])
    spec = ObjectiveSpec.from_mappings([geo, entry("coord_reg", COORD_REG, enabled=False)])
    assert [spec.objective[0].weight_in(channel) for channel in "AB"] == [0.0, 2.0]
    assert spec.objective[1].weight_in("B") == 0.0


def changed(*path, to=None, drop=False):
    """A complete objective list with one value replaced, added or removed."""
    lists = {"objective": objective(), "diagnostics": diagnostics()}
    place = lists
    for step in path[:-1]:
        place = place[step]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = copy.deepcopy(to)
    return lists


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        # names
        (
            changed("objective", 1, "name", to="bbox_gio"),
            r"objective\[1\]\.name: unknown name 'bbox_gio' .*'bbox_geo'",
        ),
        (changed("objective", 1, "name", to=["bbox_geo"]), r"objective\[1\]\.name: unknown name"),
        (
            changed("diagnostics", 0, "name", to="token_ce"),
            r"diagnostics\[0\]\.name: unknown name 'token_ce'",
        ),
        # entry keys
        (changed("objective", 0, "weight", drop=True), r"objective\[0\]\.weight is missing"),
        (changed("objective", 0, "wieght", to=1.0), r"objective\[0\]\.wieght: .*did you mean 'weight'"),
        (changed("objective", 0, to="token_ce"), r"objective\[0\]: found str 'token_ce'"),
        (changed("objective", to={"token_ce": {}}), r"objective: found dict .* expected a list"),
        # entry values
        (
            changed("objective", 2, "weight", to=-0.5),
            r"objective\[2\]\.weight = -0.5: expected a finite number >= 0",
        ),
        (changed("objective", 2, "enabled", to=1), r"objective\[2\]\.enabled = 1: expected true or false"),
        (changed("objective", 2, "channels", to=["A", "C"]), r"objective\[2\]\.channels = .*out of A, B"),
        (changed("objective", 2, "channels", to=[]), r"objective\[2\]\.channels = \[\]"),
        (changed("objective", 2, "channels", to="AB"), r"objective\[2\]\.channels = 'AB'"),
        (changed("objective", 2, "channels", to=["A", "A"]), r"objective\[2\]\.channels"),
        # module settings
        (
            changed("objective", 1, "config", "ciou_weight", drop=True),
            r"objective\[1\]\.config\.ciou_weight is missing",
        ),
        (
            changed("objective", 1, "config", "ciou_wieght", to=1),
            r"objective\[1\]\.config\.ciou_wieght: .*did you mean 'ciou_weight'",
        ),
        (
            changed("objective", 2, "config", "temperature", to=0),
            r"objective\[2\]\.config\.temperature = 0: expected a finite number > 0",
        ),
        (
            changed("objective", 2, "config", "w1_weight", to=None),
            r"objective\[2\]\.config\.w1_weight = None",
        ),
        (
            changed("objective", 0, "config", "rollout_drop_invalid_struct_ce_multiplier", to=4.5),
            r"objective\[0\]\.config\.rollout_drop_invalid_struct_ce_multiplier = 4.5: "
            r"expected a finite number >= 1 and <= 4",
        ),
        (
            changed("diagnostics", 0, "config", to={"top_k": 5}),
            r"diagnostics\[0\]\.config\.top_k: unknown name",
        ),
        # order, repetition, settings without effect
        (
            changed("objective", to=[entry("coord_reg", COORD_REG), entry("bbox_geo", BBOX_GEO)]),
            r"objective\[0\]: .*list bbox_geo first",
        ),
        (
            changed("objective", to=[entry("bbox_geo", BBOX_GEO), entry("bbox_geo", BBOX_GEO)]),
            r"objective\[1\]\.name = 'bbox_geo': already listed at .*objective\[0\]",
        ),
        (
            changed("objective", to=[entry("coord_reg", COORD_REG | {"text_gate_weight": 1.0})]),
            r"objective\[0\]\.config\.text_gate_weight = 1.0: .*off in channel A",
        ),
    ],
)
def test_mistakes_are_named_with_their_dotted_path(lists, message):
    with pytest.raises(ConfigError, match=r"^stage2_ab\.pipeline\." + message):
        ObjectiveSpec.from_mappings(lists["objective"], lists["diagnostics"], path="stage2_ab.pipeline")
