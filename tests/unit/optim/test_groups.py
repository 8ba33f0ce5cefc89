"""Which parameter goes to which group, by hand; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coordexp.errors import ConfigError
from coordexp.optim.groups import (
    GroupRule,
    Part,
    format_table,
    parameter_groups,
    pieces_of,
    refuse_unclaimed,
    table_of,
)

ALL = [Part("", ("",), 0.1)]


def parameters(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("__", "."), nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


NAMED = parameters(
    embed__weight=(9, 4),
    layers__0__q_proj__weight=(4, 4),
    layers__0__q_proj__bias=(4,),
    layers__0__norm__weight=(4,),
    vit__patch__weight=(4, 3, 2, 2, 2),
    vit__merger__weight=(4, 4),
    vit__merger__bias=(4,),
)
MUON = GroupRule("layers.*.?_proj.weight", "muon.matrices", "muon", lr_scale=2.0, weight_decay_mult=0.5)
REST = GroupRule("*", "rest")


def summary(groups) -> list[tuple[object, ...]]:
    return [
        (g.name, g.algorithm, pytest.approx(g.learning_rate), g.weight_decay, " ".join(g.names))
        for g in groups
    ]


def test_first_rule_takes_a_parameter_and_only_matrices_decay():
    slow = GroupRule("embed.*", "groups[0].patterns", lr_scale=0.5, weight_decay_mult=0.0)
    groups = parameter_groups(NAMED, [slow, MUON, REST], ALL, weight_decay=0.2)
    assert summary(groups) == [
        ("everything else", "adamw", 0.1, 0.2, "vit.patch.weight vit.merger.weight"),
        (
            "everything else (vectors)", "adamw", 0.1, 0.0,
            "layers.0.q_proj.bias layers.0.norm.weight vit.merger.bias",
        ),
        ("embed.*", "adamw", 0.05, 0.0, "embed.weight"),
        ("layers.*.?_proj.weight", "muon", 0.2, 0.1, "layers.0.q_proj.weight"),
    ]  # fmt: skip


def test_parts_of_the_model_have_rates_of_their_own_under_every_rule():
    parts = [Part("aligner", ("vit.merger",), 0.01), Part("vision tower", ("vit",), 0.001), *ALL]
    both = GroupRule("*.weight", "muon.matrices", "muon", lr_scale=10.0)
    named = [(n, p) for n, p in NAMED if p.ndim != 1]
    groups = parameter_groups(named, [both, REST], parts, weight_decay=0.0)
    assert summary(groups) == [
        ("*.weight", "muon", 1.0, 0.0, "embed.weight layers.0.q_proj.weight"),
        ("vision tower: *.weight", "muon", 0.01, 0.0, "vit.patch.weight"),
        ("aligner: *.weight", "muon", 0.1, 0.0, "vit.merger.weight"),
    ]


def test_the_rate_that_the_trainer_logs_is_that_of_the_run():
    """The HF Trainer logs the learning rate of the first group."""
    groups = parameter_groups(NAMED, [MUON, REST], ALL, weight_decay=0.2)
    assert groups[0].learning_rate == 0.1


def test_frozen_parameters_are_in_no_group_and_shared_ones_in_one():
    named = parameters(a__weight=(2, 2), b__weight=(2, 2))
    named[0][1].requires_grad_(False)
    named.append(("c.weight", named[1][1]))
    (group,) = parameter_groups(named, [REST], ALL, weight_decay=0.1)
    assert group.names == ["b.weight"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.k_proj.*", "muon.matrices: '*.k_proj.*' matches no parameter of the model; the names of trained ones look "
                       "like embed.weight, layers.0.q_proj.weight, layers.0.q_proj.bias."),
        ("layers.0.q_proj.*t", "every parameter that 'layers.0.q_proj.*t' matches (layers.0.q_proj.weight) is taken by "
                               "an earlier pattern"),
    ],
)  # fmt: skip
def test_pattern_that_takes_nothing_is_named(pattern: str, said: str):
    with pytest.raises(ConfigError) as error:
        parameter_groups(
            NAMED, [MUON, GroupRule(pattern, "muon.matrices", "muon"), REST], ALL, weight_decay=0.1
        )
    assert said in str(error.value)


def test_under_lora_the_frozen_projections_are_named_and_what_to_write():
    named = parameters(layers__0__q_proj__weight=(4, 4), layers__0__q_proj__lora_A__default__weight=(2, 4))
    named[0][1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"is frozen \(layers\.0\.q_proj\.weight\); under LoRA .*lora_A"):
        parameter_groups(named, [MUON, REST], ALL, weight_decay=0.1)
    lora = GroupRule("*.lora_A.*", "muon.matrices", "muon")
    assert [g.algorithm for g in parameter_groups(named, [lora, REST], ALL, weight_decay=0.1)] == ["muon"]


def test_parameter_without_a_group_is_named():
    with pytest.raises(ConfigError, match=r"embed\.weight is trained, and no group"):
        parameter_groups(NAMED, [MUON], ALL, weight_decay=0.1)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("embed.*", "embed.weight is an embedding"),
        ("vit.patch.*", "vit.patch.weight is of 5 dimensions"),
        ("*.bias", "layers.0.q_proj.bias is of 1 dimensions"),
        ("vit.merger.weight", "vit.merger.weight is shared by two modules"),
    ],
)
def test_muon_takes_hidden_matrices_only(pattern: str, said: str):
    named = [*NAMED, ("twin.weight", dict(NAMED)["vit.merger.weight"])]
    groups = parameter_groups(named, [GroupRule(pattern, "muon", "muon"), REST], ALL, weight_decay=0.1)
    with pytest.raises(ConfigError) as error:
        pieces_of(groups, named, {id(NAMED[0][1]): "an embedding"}, {})
    assert said in str(error.value)


def test_fused_projection_is_refused_unless_it_is_split():
    named = parameters(blocks__0__qkv__weight=(6, 2))
    groups = parameter_groups(named, [GroupRule("*.qkv.*", "muon", "muon"), REST], ALL, weight_decay=0.1)
    assert pieces_of(groups, named, {}, {"*.qkv.weight": 3}) == {named[0][1]: 3}
    for split, said in (
        ({}, "holds several projections"),
        ({"*.qkv.weight": 4}, "6 rows, which do not divide into 4"),
        ({"*.qkv.weight": 3, "*.kv.*": 2}, "'*.kv.*' matches no matrix"),
    ):
        with pytest.raises(ConfigError) as error:
            pieces_of(groups, named, {}, split)
        assert said in str(error.value)


def test_table_tells_sizes_rates_and_decay_of_each_group():
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [NAMED[0][1], NAMED[1][1]],
                "lr": 0.002,
                "weight_decay": 0.1,
                "name": "everything else",
            },
            {"params": [NAMED[3][1]], "lr": 0.01, "weight_decay": 0.0},
        ]
    )
    rows = table_of(optimizer.param_groups)
    assert rows[0] == {
        "group": "everything else", "optimizer": "adamw", "tensors": 2, "parameters": 52, "learning_rate": 0.002,
        "weight_decay": 0.1,
    }  # fmt: skip
    assert format_table(rows).splitlines() == [
        "group                optimizer  tensors  parameters  learning rate  weight decay",
        "everything else      adamw            2          52          0.002           0.1",
        "custom.coord_offset  adamw            1           4           0.01             0",
    ]


def test_parameter_that_an_optimizer_does_not_hold_is_named():
    optimizer = torch.optim.AdamW([p for n, p in NAMED if n != "vit.patch.weight"])
    with pytest.raises(ConfigError, match=r"vit\.patch\.weight is trained and stands in 0 groups"):
        refuse_unclaimed(NAMED, optimizer.param_groups)
