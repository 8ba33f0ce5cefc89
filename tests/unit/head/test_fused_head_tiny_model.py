"""Fused against plain head inside a tiny Qwen3-VL with an image: loss and every parameter's gradient.

Takes about 10 s, most of it imports.
"""

from __future__ import annotations

import pytest
import torch
from support.stage2 import objective_spec

from coordexp.head.projection import projection_of
from coordexp.head.run import apply_head
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import SupervisedRows, TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.losses.objective import Stage2Objective
from coordexp.losses.stage1 import Stage1Weights, combine, stage1_terms

IMAGE, VIDEO, VISION_START, VISION_END = 40, 41, 42, 43
FIRST_COORD, NUM_BINS = 50, 1000
VOCAB = FIRST_COORD + NUM_BINS + 6
COLUMNS = CoordColumns(range(FIRST_COORD, FIRST_COORD + NUM_BINS))
NUM_IMAGE_TOKENS = 4
ALL_MODULES = objective_spec(
    [
        {"name": name, "enabled": True, "weight": 1.0, "channels": ["A", "B"], "config": config}
        for name, config in {
            "token_ce": {
                "desc_ce_weight": 1.0,
                "self_context_struct_ce_weight": 0.1,
                "rollout_fn_desc_weight": 0.5,
                "rollout_matched_prefix_struct_weight": 0.5,
                "rollout_drop_invalid_struct_ce_multiplier": 2.0,
            },
            "bbox_geo": {"smoothl1_weight": 1.0, "ciou_weight": 1.0},
            "coord_reg": {
                "coord_ce_weight": 0.5,
                "coord_el1_weight": 0.5,
                "coord_ehuber_weight": 0.5,
                "coord_huber_delta": 0.1,
                "coord_entropy_weight": 0.1,
                "coord_gate_weight": 0.5,
                "text_gate_weight": 0.5,
                "soft_ce_weight": 0.5,
                "self_context_soft_ce_weight": 0.0,
                "w1_weight": 0.5,
                "temperature": 1.0,
                "target_sigma": 2.0,
                "target_truncate": None,
            },
        }.items()
    ]
)


def tiny_model(tied):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return Qwen3VLForConditionalGeneration(config).train()


def make_inputs(batch=2, length=30):
    """A prompt with one image per sample, then text and coordinates; labels from row 10 on."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, IMAGE, (batch, length), generator=g)
    ids[:, 1:7] = torch.tensor([VISION_START, *[IMAGE] * NUM_IMAGE_TOKENS, VISION_END])
    for start in (12, 20):
        ids[:, start : start + 4] = FIRST_COORD + torch.randint(0, NUM_BINS, (batch, 4), generator=g)
    labels = ids.clone()
    labels[:, :10] = -100
    model_inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(batch * 4 * NUM_IMAGE_TOKENS, 3 * 8 * 8, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batch),
    }
    return model_inputs, labels


def stage1_recipe(labels):
    weights = Stage1Weights(ce_weight=1.0, gate_weight=1.0)
    rows = SupervisedRows.from_labels(labels, COLUMNS)

    def objective(inputs):
        terms = stage1_terms(inputs, weights)
        return combine(terms, rows.num_text, rows.num_coord), terms.detach()

    return rows, weights.needs(), objective


def stage2_recipe(labels):
    found = SupervisedRows.from_labels(labels, COLUMNS)  # runs of four coordinate rows are boxes
    roles = torch.arange(found.num_text) % len(TextRole)
    rows = SupervisedRows.from_slots(
        found.positions_R[: found.num_text],
        found.targets_R[: found.num_text],
        roles,
        roles == 3,
        found.positions_R[found.num_text :],
        found.bins_N,
        COLUMNS,
        num_boxes=found.num_coord // 4,
    )
    objective = Stage2Objective(ALL_MODULES)
    counts = objective.counts(rows, ForwardKind.ROLLOUT)
    return (
        rows,
        objective.needs(ForwardKind.ROLLOUT),
        lambda inputs: objective(inputs, ForwardKind.ROLLOUT, counts),
    )


@pytest.mark.parametrize("recipe", [stage1_recipe, stage2_recipe], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize(
    ("tied", "checkpointing"),
    [(True, False), (False, False), (True, True)],
    ids=["tied", "untied", "checkpointing"],
)
def test_every_gradient_is_the_same(recipe, tied, checkpointing):
    model_inputs, labels = make_inputs()
    rows, needs, objective = recipe(labels)
    losses, grads = {}, {}
    for mode in ("fused", "plain"):
        model = tiny_model(tied)
        if checkpointing:
            model.gradient_checkpointing_enable()
        hidden_BTH = model.model(**model_inputs).last_hidden_state
        projection = projection_of(model.lm_head, hidden_BTH.flatten(0, 1)[rows.positions_R])
        losses[mode], _ = apply_head(projection, rows, COLUMNS, needs, objective, mode=mode, chunk_rows=8)
        losses[mode].backward()
        grads[mode] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert losses["fused"].item() == pytest.approx(losses["plain"].item(), rel=1e-6)
    assert grads["fused"].keys() == grads["plain"].keys()
    assert any("visual" in name for name in grads["plain"])
    for name, expected in grads["plain"].items():
        assert (grads["fused"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
