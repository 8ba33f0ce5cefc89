"""The fused head gives the loss, numbers and gradients of the plain head, and never builds the logits."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from support.stage2 import objective_spec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coordexp.errors import ConfigError
from coordexp.head.projection import HeadProjection, projection_of
from coordexp.head.run import apply_head, default_chunk_rows
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective, Stage2Terms
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

K, V, H = 40, 150, 24
CONSECUTIVE = CoordColumns(range(60, 60 + K))
SCATTERED = CoordColumns(torch.randperm(V, generator=torch.Generator().manual_seed(9))[:K].tolist())
MIX = {"ce_weight": 1.0, "gate_weight": 1.0}
STAGE2 = objective_spec(
    [
        {
            "name": "token_ce",
            "enabled": True,
            "weight": 1.0,
            "channels": ["A", "B"],
            "config": {
                "desc_ce_weight": 0.5,
                "self_context_struct_ce_weight": 0.3,
                "rollout_fn_desc_weight": 0.7,
                "rollout_matched_prefix_struct_weight": 0.4,
                "rollout_drop_invalid_struct_ce_multiplier": 2.0,
            },
        },
        {
            "name": "bbox_geo",
            "enabled": True,
            "weight": 1.0,
            "channels": ["A", "B"],
            "config": {"smoothl1_weight": 1.0, "ciou_weight": 1.0},
        },
        {
            "name": "coord_reg",
            "enabled": True,
            "weight": 1.0,
            "channels": ["A", "B"],
            "config": {
                "coord_ce_weight": 0.5,
                "coord_el1_weight": 0.5,
                "coord_ehuber_weight": 0.5,
                "coord_huber_delta": 0.1,
                "coord_entropy_weight": 0.5,
                "coord_gate_weight": 0.5,
                "text_gate_weight": 0.5,
                "soft_ce_weight": 0.5,
                "self_context_soft_ce_weight": 0.1,
                "w1_weight": 0.5,
                "temperature": 1.3,
                "target_sigma": 2.0,
                "target_truncate": 6,
            },
        },
    ],
    [{"name": "coord_diag", "enabled": True, "weight": 1.0, "channels": ["A", "B"], "config": {}}],
)


def make_rows(columns, num_rows=53, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (num_rows,), generator=g)
    coord = torch.rand(num_rows, generator=g) < 0.4
    targets[coord] = torch.tensor(columns.ids)[torch.randint(0, K, (int(coord.sum()),), generator=g)]
    return SupervisedRows.from_targets(targets, columns)


def make_projection(num_rows, parts=("hidden_RH", "weight_VH"), dtype=torch.float32, seed=1):
    """Random leaves; `parts` names the tensors there are."""
    shapes = {
        "hidden_RH": (num_rows, H),
        "weight_VH": (V, H),
        "bias_V": (V,),
        "lora_Rr": (num_rows, 3),
        "lora_weight_Vr": (V, 3),
        "coord_offset_KH": (K, H),
    }
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shapes[name], generator=g).to(dtype).requires_grad_() for name in shapes}
    return HeadProjection(**{name: made[name] for name in parts})


ALL_PARTS = tuple(field.name for field in fields(HeadProjection))


def stage1(settings):
    """(needs, objective) of stage 1 with some counts of a step."""
    weights = Stage1Weights.from_mapping(settings)

    def objective(inputs):
        terms = stage1_terms(inputs, weights)
        return combine(terms, torch.tensor(61.0), torch.tensor(47.0)), terms.detach()

    return weights.needs(), objective, Stage1Terms.merge


def run(mode, projection, rows, columns, recipe, **options):
    """Loss, gradients by name, and numbers."""
    needs, objective, merge = recipe
    loss, parts = apply_head(projection, rows, columns, needs, objective, mode=mode, **options)
    (loss * 0.37).backward()  # whatever scales the loss afterwards
    grads = {
        field.name: getattr(projection, field.name).grad
        for field in fields(HeadProjection)
        if getattr(projection, field.name) is not None
    }
    numbers = {key: value.mean().item() for key, value in merge(parts).metrics().items()}
    return loss.detach(), grads, numbers


def assert_same(fused, plain, tolerance):
    assert fused[0].item() == pytest.approx(plain[0].item(), rel=tolerance)
    assert fused[1].keys() == plain[1].keys()
    for name, grad in plain[1].items():
        assert fused[1][name].dtype == grad.dtype
        assert (fused[1][name] - grad).norm() <= tolerance * grad.norm(), name
    averaged = {key: value for key, value in plain[2].items() if "tokens" not in key}
    assert {key: fused[2][key] for key in averaged} == pytest.approx(
        averaged, rel=max(tolerance, 1e-5), abs=1e-7
    )
    assert fused[2].keys() == plain[2].keys()


SETTINGS = [
    MIX,
    {},
    {"enabled": False},
    {"enabled": False, "gate_weight": 1.0, "temperature": 2.0},
    MIX | {"temperature": 0.5, "target_truncate": 3},
]


@pytest.mark.parametrize("columns", [CONSECUTIVE, SCATTERED], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_stage1_equals_plain_in_float64(settings, columns):
    rows = make_rows(columns)
    results = [
        run(
            mode, make_projection(53, ALL_PARTS, torch.float64), rows, columns, stage1(settings), chunk_rows=8
        )
        for mode in ("fused", "plain")
    ]
    assert_same(*results, tolerance=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000, None])
def test_stage1_equals_plain_in_float32_for_any_chunk(chunk_rows):
    rows = make_rows(CONSECUTIVE)
    fused = run("fused", make_projection(53), rows, CONSECUTIVE, stage1(MIX), chunk_rows=chunk_rows)
    plain = run("plain", make_projection(53), rows, CONSECUTIVE, stage1(MIX))
    assert_same(fused, plain, tolerance=1e-5)


def stage2_rows(num_boxes=5, num_text=31, num_vertices=4):
    g = torch.Generator().manual_seed(4)
    order = torch.arange(num_text + 4 * num_boxes + 2 * num_vertices)
    low = torch.randint(0, K // 2, (num_boxes, 2), generator=g)
    text_targets = torch.randint(0, 60, (num_text,), generator=g)
    return SupervisedRows.from_slots(
        order[:num_text],
        text_targets,
        torch.randint(0, len(TextRole), (num_text,), generator=g),
        torch.rand(num_text, generator=g) < 0.5,
        order[num_text:],
        torch.cat(
            [
                torch.cat([low, low + K // 3], 1).flatten(),
                torch.randint(0, K, (2 * num_vertices,), generator=g),
            ]
        ),
        CONSECUTIVE,
        num_boxes=num_boxes,
    )


@pytest.mark.parametrize("chunk_rows", [1, 6, 500])  # boxes are kept whole: chunks of 4, 4 and all
@pytest.mark.parametrize("decode_mode", ["exp", "st"])
@pytest.mark.parametrize("forward", ForwardKind)
def test_stage2_with_all_modules_equals_plain(forward, decode_mode, chunk_rows):
    rows = stage2_rows()
    objective = Stage2Objective(STAGE2, decode_mode)
    counts = {name: 2 * count for name, count in objective.counts(rows, forward).items()}
    recipe = (objective.needs(forward), lambda inputs: objective(inputs, forward, counts), Stage2Terms.merge)
    results = [
        run(mode, make_projection(rows.num_rows), rows, CONSECUTIVE, recipe, chunk_rows=chunk_rows)
        for mode in ("fused", "plain")
    ]
    assert_same(*results, tolerance=1e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
def test_bfloat16_is_no_worse_than_plain_bfloat16(autocast):
    """Distance to the float32 gradient, fused against plain, with the products in bfloat16."""
    rows = make_rows(CONSECUTIVE, 200)
    dtype = torch.float32 if autocast else torch.bfloat16
    projections = [make_projection(200, dtype=dtype) for _ in range(2)]
    truth_in = make_projection(200, dtype=dtype)
    truth = run(
        "plain",
        HeadProjection(
            *[None if t is None else t.detach().float().requires_grad_() for t in truth_in.tensors()]
        ),
        rows,
        CONSECUTIVE,
        stage1(MIX),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fused = run("fused", projections[0], rows, CONSECUTIVE, stage1(MIX), chunk_rows=16)
        plain = run("plain", projections[1], rows, CONSECUTIVE, stage1(MIX))

    assert abs(fused[0] - truth[0]) <= abs(plain[0] - truth[0]) + 1e-3 * truth[0].abs()
    for name, exact in truth[1].items():
        assert fused[1][name].dtype == dtype
        error, plain_error = ((x[1][name].float() - exact).norm() for x in (fused, plain))
        assert error <= 1.05 * plain_error + 1e-5 * exact.norm()


def test_extreme_hidden_states_stay_finite_and_equal():
    rows = make_rows(CONSECUTIVE)
    results = []
    for mode in ("fused", "plain"):
        projection = make_projection(53)
        with torch.no_grad():
            projection.hidden_RH.mul_(2000)  # logits around +-1e4
        results.append(run(mode, projection, rows, CONSECUTIVE, stage1(MIX), chunk_rows=8))
    assert all(torch.isfinite(grad).all() for grad in results[0][1].values())
    assert_same(*results, tolerance=2e-4)


def test_only_what_is_trained_gets_a_gradient():
    """A frozen head passes gradient to the hidden states and the offset, and has none itself."""
    rows = make_rows(CONSECUTIVE)
    projection = make_projection(53, ("hidden_RH", "weight_VH", "coord_offset_KH"))
    projection.weight_VH.requires_grad_(False)
    _, grads, _ = run("fused", projection, rows, CONSECUTIVE, stage1(MIX), chunk_rows=8)
    assert grads["weight_VH"] is None
    assert grads["hidden_RH"].abs().sum() > 0
    assert grads["coord_offset_KH"].abs().sum() > 0


def test_tied_weight_collects_both_gradients():
    """The weight is also an embedding: gradients of both uses add up as in the plain head."""
    rows = make_rows(CONSECUTIVE)
    tokens = torch.arange(53) % V
    grads = []
    for mode in ("fused", "plain"):
        weight = make_projection(53).weight_VH
        hidden = torch.tanh(weight[tokens])
        needs, objective, _ = stage1(MIX)
        loss, _ = apply_head(
            HeadProjection(hidden, weight), rows, CONSECUTIVE, needs, objective, mode=mode, chunk_rows=8
        )
        loss.backward()
        grads.append(weight.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize("mode", ["plain", "fused", "auto"])
def test_no_rows(mode):
    rows = make_rows(CONSECUTIVE, 0)
    projection = make_projection(0)
    loss, grads, numbers = run(mode, projection, rows, CONSECUTIVE, stage1(MIX))
    assert loss == 0
    assert grads["weight_VH"].abs().max() == 0
    assert numbers == {"base_ce/noncoord_tokens": 0}


@pytest.mark.parametrize("kind", ["text", "coord"])
def test_rows_of_one_kind(kind):
    targets = torch.arange(20) if kind == "text" else torch.arange(60, 80)
    rows = SupervisedRows.from_targets(targets, CONSECUTIVE)
    results = [
        run(mode, make_projection(20), rows, CONSECUTIVE, stage1(MIX), chunk_rows=7)
        for mode in ("fused", "plain")
    ]
    assert_same(*results, tolerance=1e-5)


def test_evaluation_computes_the_same_loss_and_no_gradient():
    rows = make_rows(CONSECUTIVE)
    needs, objective, _ = stage1(MIX)
    losses = []
    with torch.no_grad():
        for mode in ("fused", "plain"):
            loss, _ = apply_head(
                make_projection(53), rows, CONSECUTIVE, needs, objective, mode=mode, chunk_rows=8
            )
            assert not loss.requires_grad
            losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("mode", ["fused", "plain"])
def test_observer_sees_every_row_of_logits_once(mode):
    rows = make_rows(SCATTERED)
    projection = make_projection(53)
    seen = []
    needs, objective, _ = stage1({})
    apply_head(
        projection,
        rows,
        SCATTERED,
        needs,
        objective,
        mode=mode,
        chunk_rows=8,
        observe=lambda logits, piece: seen.append((logits.clone(), piece.targets_R)),
    )
    torch.testing.assert_close(torch.cat([logits for logits, _ in seen]), projection.logits(SCATTERED))
    assert torch.equal(torch.cat([targets for _, targets in seen]), rows.targets_R)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("settings", SETTINGS)
def test_memory_does_not_grow_with_the_number_of_rows(settings):
    """No operation returns more than a chunk of logits, hidden states or a weight."""
    for num_rows in (200, 400):
        rows = make_rows(CONSECUTIVE, num_rows)
        projection = make_projection(num_rows)
        with LargestTensor() as fused:
            run("fused", projection, rows, CONSECUTIVE, stage1(settings), chunk_rows=16)
        assert fused.numel <= max(16 * V, V * H, num_rows * H)
    with LargestTensor() as plain:  # the measure sees the logits where there are any
        run("plain", projection, rows, CONSECUTIVE, stage1(settings))
    assert plain.numel >= 400 * V


def test_coordinate_rows_without_gate_use_only_their_columns_of_the_head():
    """No other row of the head gets a gradient from coordinate rows, nor is it multiplied."""
    rows = SupervisedRows.from_targets(torch.arange(60, 100), CONSECUTIVE)
    projection = make_projection(40)
    with LargestTensor() as used:
        _, grads, _ = run("fused", projection, rows, CONSECUTIVE, stage1({}), chunk_rows=40)
    assert used.numel < 40 * V
    outside = grads["weight_VH"].clone()
    outside[60:100] = 0
    assert outside.abs().max() == 0
    assert grads["weight_VH"][60:100].norm() > 0


def test_default_chunk_fits_the_budget():
    wide = HeadProjection(torch.zeros(1, 1), torch.zeros(1, 1).expand(152_681, 1))
    assert default_chunk_rows(wide) == 128
    narrow = HeadProjection(torch.zeros(1, 1), torch.zeros(2000, 1))
    assert default_chunk_rows(narrow) == 10_464


@pytest.mark.parametrize(
    ("num_rows", "dtype", "expected"),
    [(53, torch.float32, "plain"), (500_000, torch.float32, "fused"), (500_000, torch.float16, "plain")],
)
def test_auto_chooses_by_size_and_dtype_of_the_logits(num_rows, dtype, expected):
    """Seen from the number of pieces: the plain head evaluates the objective once."""
    rows = SupervisedRows.from_targets(torch.zeros(num_rows, dtype=torch.int64), CONSECUTIVE)
    projection = HeadProjection(torch.zeros(num_rows, 1, dtype=dtype), torch.zeros(V, 1, dtype=dtype))
    needs, objective, _ = stage1({})
    with torch.no_grad():
        _, parts = apply_head(projection, rows, CONSECUTIVE, needs, objective)
    assert ("plain" if len(parts) == 1 else "fused") == expected


def test_refusals():
    rows, (needs, objective, _) = make_rows(CONSECUTIVE), stage1(MIX)
    with pytest.raises(ConfigError, match="auto, plain, fused"):
        apply_head(make_projection(53), rows, CONSECUTIVE, needs, objective, mode="liger")
    with pytest.raises(ConfigError, match="float16"):
        apply_head(
            make_projection(53, dtype=torch.float16), rows, CONSECUTIVE, needs, objective, mode="fused"
        )
    loss, _ = apply_head(make_projection(53), rows, CONSECUTIVE, needs, objective, mode="fused")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


# --- head modules --------------------------------------------------------------------------------------


def peft_head(r=4, **options):
    """The `lm_head` of a small model under PEFT, with LoRA's B away from its zero start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Module()
    model.body, model.lm_head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
    head = get_peft_model(model, LoraConfig(r=r, lora_alpha=16, **options)).base_model.model.lm_head
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return head


@pytest.mark.parametrize(
    "make_head",
    [
        lambda: nn.Linear(H, V),
        lambda: nn.Linear(H, V, bias=False),
        lambda: peft_head(target_modules=["lm_head"]),
        lambda: peft_head(target_modules=["lm_head"], use_rslora=True, r=7),
        lambda: peft_head(target_modules=["body"], modules_to_save=["lm_head"]),
    ],
    ids=["bias", "no bias", "lora", "rslora", "modules_to_save"],
)
def test_projection_gives_the_logits_of_the_module(make_head):
    head, hidden = make_head(), torch.randn(9, H)
    torch.testing.assert_close(projection_of(head, hidden).logits(CONSECUTIVE), head(hidden))


def test_projection_of_merged_lora():
    head, hidden = peft_head(target_modules=["lm_head"]), torch.randn(9, H)
    before = head(hidden)
    head.merge()
    torch.testing.assert_close(projection_of(head, hidden).logits(CONSECUTIVE), before, rtol=1e-4, atol=1e-4)


def test_lora_on_the_head_trains_the_same_through_both_heads():
    rows = make_rows(CONSECUTIVE)
    needs, objective, _ = stage1(MIX)
    grads = {}
    for mode in ("fused", "plain"):
        head = peft_head(target_modules=["lm_head"])
        hidden = make_projection(53).hidden_RH
        loss, _ = apply_head(
            projection_of(head, hidden), rows, CONSECUTIVE, needs, objective, mode=mode, chunk_rows=8
        )
        loss.backward()
        grads[mode] = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
        grads[mode]["hidden"] = hidden.grad
    assert {name.split(".")[0] for name in grads["plain"]} == {"lora_A", "lora_B", "hidden"}
    for name, grad in grads["plain"].items():
        assert (grads["fused"][name] - grad).norm() <= 1e-5 * grad.norm()


def test_heads_that_are_no_sum_of_products_are_refused():
    with pytest.raises(ConfigError, match=r"torch\.nn\.modules\.container\.Sequential.*custom\.head = plain"):
        projection_of(nn.Sequential(nn.Linear(H, V)), torch.zeros(1, H))
    with pytest.raises(ConfigError, match="DoRA"):
        projection_of(peft_head(target_modules=["lm_head"], use_dora=True), torch.zeros(1, H))
