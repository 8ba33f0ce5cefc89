"""Packing: every index moves with its sample, and a packed forward equals the samples' own forwards."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.errors import ConfigError, ContractError
from coordexp.losses.columns import CoordColumns
from coordexp.matching import match_objects
from coordexp.models.tiny import build_tiny_model
from coordexp.packing.choice import plan_packs
from coordexp.packing.layout import block_causal_mask, pack_samples, pad_samples
from coordexp.packing.position_ids import VisionLayout, position_ids
from coordexp.targets import Media, TargetBuilder
from coordexp.targets.rows import slot_positions, stage2_rows

TOLERANCE = 2e-5  # float32 logits of order 1 to 10; a sample that sees its neighbour is off by more than 0.1
LAYOUT = VisionLayout(image_token_id=9, spatial_merge_size=2)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The nano Qwen3-VL with weights large enough that attending to a neighbour shows."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    build_tiny_model(folder, preset="nano")
    processor = AutoProcessor.from_pretrained(folder)
    models = {
        name: AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=name).float().eval()
        for name in ("sdpa", "eager")
    }
    noise = torch.Generator().manual_seed(1)
    for sdpa, eager in zip(models["sdpa"].parameters(), models["eager"].parameters(), strict=True):
        sdpa.data += 0.1 * torch.randn(sdpa.shape, generator=noise)
        eager.data = sdpa.data
    return SimpleNamespace(
        processor=processor,
        tok=processor.tokenizer,
        models=models,
        layout=VisionLayout.from_config(models["sdpa"].config),
        columns=CoordColumns(CoordVocab.from_tokenizer(processor.tokenizer).ids),
    )


def box(desc, *bins):
    return BoxObject(desc, "bbox_2d", bins)


def encoded_prompt(nano, sizes, seed):
    """Token ids (placeholders expanded) and media of a question about random images of (width, height)."""
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Detect."}]
    text = nano.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    encoded = nano.processor(text=[text], images=images or None, return_tensors="pt")
    media = Media(encoded["pixel_values"], encoded["image_grid_thw"].numpy()) if images else None
    return encoded["input_ids"][0].tolist(), media


def some_samples(nano):
    """A rollout with an image, ground truth with two images, and ground truth without any."""
    builder = TargetBuilder(nano.tok)
    prompt_ids, media = encoded_prompt(nano, [(64, 32)], seed=0)
    response = (
        '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_12|>, <|coord_22|>, <|coord_310|>, <|coord_402|>]}, '
        '{"desc": "dog", "bbox_2d": [<|coord_700|>, <|coord_0|>, <|coord_800|>, <|coord_90|>]}]}<|im_end|>'
    )
    parsed = parse_rollout(nano.tok.encode(response, add_special_tokens=False), nano.tok)
    gts = [box("red box", 10, 20, 300, 400), box("cat", 500, 501, 900, 901)]
    rollout = builder.from_rollout(
        prompt_ids,
        parsed,
        match_objects(parsed.objects, gts),
        gts,
        generation_prompt_ids=prompt_ids,
        sample_id="rollout",
        media=media,
    )
    prompt_ids, media = encoded_prompt(nano, [(32, 64), (96, 48)], seed=1)
    two_images = builder.from_ground_truth(prompt_ids, gts[:1], sample_id="two images", media=media)
    prompt_ids, _ = encoded_prompt(nano, [], seed=2)
    no_image = builder.from_ground_truth(prompt_ids, gts[1:], sample_id="no image")
    return [rollout, two_images, no_image]


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits.flatten(0, 1)


def transformers_own_logits(model, sample):
    """The usual way with one sample: no position ids given, the model finds them itself."""
    ids = torch.tensor(sample.token_ids_T)[None]
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
    if sample.media is not None:
        inputs["pixel_values"] = sample.media.pixel_values_PD
        inputs["image_grid_thw"] = torch.tensor(sample.media.image_grid_thw_I3)
    return logits_of(model, inputs)


@pytest.fixture(scope="module")
def singles(nano):
    """The samples, and the logits of each in a forward of its own."""
    samples = some_samples(nano)
    return samples, [transformers_own_logits(nano.models["sdpa"], sample) for sample in samples]


def largest_difference(logits, expected):
    return float((logits - torch.cat(expected)).abs().max())


def test_packed_logits_equal_those_of_single_forwards(nano, singles):
    samples, expected = singles
    assert max(float(part.abs().max()) for part in expected) > 1
    for order in ([0, 1, 2], [2, 1, 0]):
        batch = pack_samples([samples[i] for i in order], nano.layout)
        logits = logits_of(nano.models["sdpa"], batch.model_inputs())
        assert largest_difference(logits, [expected[i] for i in order]) < TOLERANCE


def test_three_rows_or_a_cache_would_let_samples_see_each_other(nano, singles):
    """Why the text row and use_cache=False are not optional: nothing fails, the logits are just wrong."""
    samples, expected = singles
    inputs = pack_samples(samples, nano.layout).model_inputs()
    first = samples[0].num_tokens
    for wrong in ({"position_ids": inputs["position_ids"][1:]}, {"use_cache": True}):
        logits = logits_of(nano.models["sdpa"], inputs | wrong)
        assert (logits[:first] - expected[0]).abs().max() < TOLERANCE
        assert (logits[first:] - torch.cat(expected[1:])).abs().max() > 0.1


@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.bool), ("eager", torch.float32)])
def test_the_explicit_mask_isolates_samples_without_the_text_row(nano, singles, attention, dtype):
    samples, expected = singles
    inputs = pack_samples(samples, nano.layout, mask_dtype=dtype).model_inputs()
    model = nano.models[attention]
    assert largest_difference(logits_of(model, inputs), expected) < TOLERANCE
    three_rows = inputs | {"position_ids": inputs["position_ids"][1:]}
    assert largest_difference(logits_of(model, three_rows), expected) < TOLERANCE


def rows_of(batch, columns):
    return stage2_rows(batch.samples, batch.starts, columns)


def test_padded_logits_equal_those_of_single_forwards(nano, singles):
    samples, expected = singles
    batch = pad_samples(samples, nano.layout, pad_token_id=nano.tok.pad_token_id)
    logits = logits_of(nano.models["sdpa"], batch.model_inputs())
    kept = batch.attention_mask.flatten().bool()
    assert int(kept.sum()) == batch.num_tokens
    assert largest_difference(logits[kept], expected) < TOLERANCE


def test_supervised_rows_select_the_same_logits_packed_padded_and_alone(nano, singles):
    samples, expected = singles
    model, columns = nano.models["sdpa"], nano.columns
    alone = [rows_of(pack_samples([sample], nano.layout), columns) for sample in samples]
    texts = [part[rows.positions_R[: rows.num_text]] for part, rows in zip(expected, alone, strict=True)]
    coords = [part[rows.positions_R[rows.num_text :]] for part, rows in zip(expected, alone, strict=True)]
    reference = torch.cat([*texts, *coords])
    for batch in (
        pack_samples(samples, nano.layout),
        pad_samples(samples, nano.layout, pad_token_id=nano.tok.pad_token_id),
    ):
        rows = rows_of(batch, columns)
        logits_RV = logits_of(model, batch.model_inputs())[rows.positions_R]
        assert float((logits_RV - reference).abs().max()) < TOLERANCE


# --- layout ---------------------------------------------------------------------------------------------

words, corners = (
    st.sampled_from(["cat", "red box", "猫"]),
    st.tuples(st.integers(0, 999), st.integers(0, 999)),
)
object_lists = st.lists(
    st.builds(lambda desc, x, y: box(desc, min(x), min(y), max(x), max(y)), words, corners, corners)
    | st.builds(
        lambda desc, *points: BoxObject(desc, "poly", sum(points, ())), words, corners, corners, corners
    ),
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.tuples(st.integers(1, 5), object_lists), min_size=1, max_size=4))
def test_a_pack_sliced_at_its_starts_gives_back_every_sample(nano, contents):
    builder, columns = TargetBuilder(nano.tok), nano.columns
    samples = [
        builder.from_ground_truth(list(range(20, 20 + num_prompt)), objects, sample_id=str(i))
        for i, (num_prompt, objects) in enumerate(contents)
    ]
    packed = pack_samples(samples, nano.layout)
    padded = pad_samples(samples, nano.layout, pad_token_id=0)
    width = max(sample.num_tokens for sample in samples)
    assert packed.starts == tuple(sum(s.num_tokens for s in samples[:i]) for i in range(len(samples)))
    assert padded.starts == tuple(width * i for i in range(len(samples)))
    for batch in (packed, padded):
        ids = batch.input_ids_BT.flatten()
        positions = batch.position_ids_4BT.flatten(1)
        rows, slots = (
            stage2_rows(batch.samples, batch.starts, columns),
            slot_positions(batch.samples, batch.starts),
        )
        assert batch.num_samples == len(samples)
        assert batch.num_tokens == sum(sample.num_tokens for sample in samples)
        of_boxes = [columns.ids[k] for s in samples for k in s.box_bins_B4.ravel()]
        assert ids[slots].tolist() == of_boxes + [columns.ids[k] for s in samples for k in s.poly_bins_N]
        assert torch.equal(slots - 1, rows.positions_R[rows.num_text :])
        for sample, start in zip(samples, batch.starts, strict=True):
            span = slice(start, start + sample.num_tokens)
            assert ids[span].tolist() == sample.token_ids_T.tolist()
            alone = pack_samples([sample], nano.layout)
            assert positions[:, span].tolist() == alone.position_ids_4BT[:, 0].tolist()
            own = (rows.positions_R >= span.start) & (rows.positions_R < span.stop)
            expected = stage2_rows(alone.samples, alone.starts, columns)
            assert (rows.positions_R[own] - start).tolist() == expected.positions_R.tolist()
            assert rows.targets_R[own].tolist() == expected.targets_R.tolist()
            own_coords = own[rows.num_text :]
            assert rows.bins_N[own_coords].tolist() == expected.bins_N.tolist()
    assert padded.attention_mask.sum(dim=1).tolist() == [sample.num_tokens for sample in samples]


def test_images_follow_the_order_of_the_samples(nano, singles):
    samples, _ = singles
    batch = pack_samples([samples[2], samples[1], samples[0]], nano.layout)
    assert batch.image_grid_thw_I3.tolist() == [[1, 8, 4], [1, 6, 12], [1, 4, 8]]
    expected = torch.cat([samples[1].media.pixel_values_PD, samples[0].media.pixel_values_PD])
    assert torch.equal(batch.pixel_values_PD, expected)
    text_only = pack_samples(samples[2:], nano.layout).model_inputs()
    assert sorted(text_only) == ["input_ids", "position_ids", "use_cache"]


def test_a_forward_needs_a_sample(nano):
    for make in (
        lambda: pack_samples([], nano.layout),
        lambda: pad_samples([], nano.layout, pad_token_id=0),
    ):
        with pytest.raises(ContractError, match="no samples"):
            make()


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_the_mask_lets_a_token_see_its_own_past(lengths):
    owner = [i for i, length in enumerate(lengths) for _ in range(length)]
    expected = [[owner[q] == owner[k] and k <= q for k in range(len(owner))] for q in range(len(owner))]
    assert block_causal_mask(lengths)[0, 0].tolist() == expected
    added = block_causal_mask(lengths, torch.bfloat16)[0, 0]
    assert (added == 0).tolist() == expected
    assert (added == torch.finfo(torch.bfloat16).min).tolist() == (~torch.tensor(expected)).tolist()


@given(lengths=st.lists(st.integers(1, 50), max_size=30))
def test_plan_packs_uses_each_segment_once_within_capacity(lengths):
    packs = plan_packs(lengths, capacity=60)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    waiting = list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[index] for index in pack) <= 60
        assert pack[0] == waiting[0]  # the oldest leaves first
        assert pack == sorted(pack)
        waiting = [index for index in waiting if index not in pack]
    # Two packs that fit into one would have been one.
    fill = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(a + b > 60 for a, b in pairwise(fill))


def test_plan_packs_hand_worked():
    assert plan_packs([50, 30, 20, 40, 10], capacity=60) == [[0, 4], [1, 2], [3]]
    with pytest.raises(ContractError, match="segment 1 has 70 tokens but a pack holds 60"):
        plan_packs([50, 70], capacity=60)


# --- position ids ---------------------------------------------------------------------------------------


def test_positions_of_text_and_an_image_by_hand():
    """Two text tokens, an image of 2 x 3 visual tokens (4 x 6 patches), one text token."""
    ids = [1, 2, *[9] * 6, 3]
    assert position_ids(ids, [[1, 4, 6]], LAYOUT).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert position_ids([5, 6, 7], [], LAYOUT).tolist() == [[0, 1, 2]] * 4


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=0, max_size=3
    ),
    num_tail=st.integers(1, 4),
)
def test_positions_equal_those_of_the_model(nano, parts, num_tail):
    """Reference: `get_rope_index` of the loaded model. parts: (text tokens, rows, columns of visual tokens)."""
    image_id = nano.layout.image_token_id
    ids = [i for text, h, w in parts for i in [20] * text + [image_id] * (h * w)] + [21] * num_tail
    grids = np.array([[1, 2 * h, 2 * w] for _, h, w in parts], dtype=np.int64).reshape(-1, 3)
    batch = torch.tensor(ids)[None]
    expected, _ = nano.models["sdpa"].model.get_rope_index(
        batch, (batch == image_id).int(), image_grid_thw=torch.tensor(grids) if parts else None
    )
    found = position_ids(ids, grids, nano.layout)
    assert found[0].tolist() == list(range(len(ids)))
    assert found[1:].tolist() == expected[:, 0].tolist()


def test_placeholders_that_do_not_fit_the_images_are_an_error(nano):
    with pytest.raises(ContractError, match=r"5 image placeholders, its 1 images make 6 visual tokens"):
        position_ids([1, *[9] * 5], [[1, 4, 6]], LAYOUT)
    with pytest.raises(ContractError, match=r"begin at token 1 but are interrupted before token 7"):
        position_ids([1, 9, 9, 9, 2, 9, 9, 9], [[1, 4, 6]], LAYOUT)
    prompt_ids, media = encoded_prompt(nano, [(32, 32)], seed=0)
    twice = [nano.layout.image_token_id, *prompt_ids]
    sample = TargetBuilder(nano.tok).from_ground_truth(twice, [], sample_id="train.jsonl:7", media=media)
    with pytest.raises(ContractError, match=r"sample train\.jsonl:7: the prompt has 5 image placeholders"):
        pack_samples([sample], nano.layout)


def test_a_layout_needs_a_vision_language_config(nano):
    config = nano.models["sdpa"].config
    assert nano.layout == VisionLayout(config.image_token_id, 2)
    with pytest.raises(ConfigError, match="expected the config of a Qwen3-VL model"):
        VisionLayout.from_config(config.text_config)
