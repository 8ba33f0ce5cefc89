"""Self-context forwards of a 2-layer Qwen3-VL with images against a reference that builds its own embeddings.

Takes about 10 s, most of it imports.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.self_context import self_context_logits, slot_logits
from torch import Tensor, nn

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.errors import ContractError
from coordexp.models.self_context import (
    CoordSlots,
    SelfContext,
    embedded_slots,
    run_self_context,
    slot_embeddings,
)
from coordexp.models.tiny import build_tiny_model

BATCH, LENGTH = 2, 24
SLOTS = {0: [12, 13, 14, 15], 1: [11, 12, 13, 14, 18, 19, 20, 21]}
SOFT_UNROLL = SelfContext(num_forwards=2)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "model"
    build_tiny_model(path, preset="nano")
    return path


@pytest.fixture
def model(nano: Path) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(nano).double().train()


@pytest.fixture(scope="module")
def coord_ids(nano: Path) -> Tensor:
    from transformers import AutoTokenizer

    return torch.tensor(CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(nano)).ids)


@pytest.fixture
def batch(model: nn.Module, coord_ids: Tensor) -> dict[str, Tensor]:
    """An image of 4 visual tokens a sample, then text and coordinate tokens; the second sample is padded."""
    g = torch.Generator().manual_seed(1)
    config = model.config
    ids = torch.randint(40, 400, (BATCH, LENGTH), generator=g)
    ids[:, 2:8] = torch.tensor(
        [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    )
    for sample, places in SLOTS.items():
        ids[sample, places] = coord_ids[torch.randint(0, 1000, (len(places),), generator=g)]
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 20:] = 0
    return {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(BATCH * 16, 3 * 2 * 8 * 8, generator=g, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


@pytest.fixture
def slots(coord_ids: Tensor) -> CoordSlots:
    positions = [b * LENGTH + p for b, places in SLOTS.items() for p in places]
    return CoordSlots(torch.tensor(positions), coord_ids)


def loss_of(logits_BTV: Tensor) -> Tensor:
    """Something that depends on every row in its own way."""
    weights = torch.linspace(-1.0, 1.0, logits_BTV.numel(), dtype=logits_BTV.dtype).view_as(logits_BTV)
    return (logits_BTV.log_softmax(-1) * weights.cos()).mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-12, msg=name)


class Reference:
    """Embeddings, image features, positions and masks put together by hand, slot by slot."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], coord_ids: Tensor):
        self.model, self.batch, self.coord_ids = model, batch, coord_ids
        inner = model.model
        self.positions, _ = inner.get_rope_index(
            batch["input_ids"],
            batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch["attention_mask"],
        )
        self.is_image = batch["input_ids"] == model.config.image_token_id
        self.table = model.get_input_embeddings().weight

    def forward(self, embeds: Tensor) -> Tensor:
        inner = self.model.model
        images = inner.get_image_features(self.batch["pixel_values"], self.batch["image_grid_thw"])
        embeds = embeds.clone()
        embeds[self.is_image] = torch.cat(images.pooler_output)
        hidden = inner.language_model(
            inputs_embeds=embeds,
            position_ids=self.positions,
            attention_mask=self.batch["attention_mask"],
            visual_pos_masks=self.is_image,
            deepstack_visual_embeds=[torch.cat(feature) for feature in images.deepstack_features],
        ).last_hidden_state
        return self.model.lm_head(hidden)

    def logits(
        self, num_forwards: int, mode: str, *, detach: bool = False, temperature: float = 1.0
    ) -> Tensor:
        """Logits of the last forward."""
        logits = self.forward(self.table[self.batch["input_ids"]])
        for _ in range(num_forwards - 1):
            rows = list(self.table[self.batch["input_ids"]].unbind(0))
            for sample, places in SLOTS.items():
                row = list(rows[sample].unbind(0))
                for place in places:
                    z = logits[sample, place - 1, self.coord_ids]
                    z = z.detach() if detach else z
                    p = torch.softmax(z / temperature, -1)
                    if mode == "hard":
                        p = nn.functional.one_hot(p.argmax(), len(self.coord_ids)).to(p)
                    row[place] = p @ self.table[self.coord_ids]
                rows[sample] = torch.stack(row)
            logits = self.forward(torch.stack(rows))
        return logits


def test_one_forward_is_the_plain_teacher_forced_one(model, batch, slots):
    [logits] = self_context_logits(model, batch, slots, SelfContext(num_forwards=1))
    assert torch.equal(logits, model(**batch).logits)


@pytest.mark.parametrize("num_forwards", [1, 2, 3])
def test_as_many_forwards_as_asked_for_and_no_cache(model, batch, slots, num_forwards):
    caches = []
    model.model.language_model.register_forward_hook(lambda _m, _a, out: caches.append(out.past_key_values))
    results = self_context_logits(model, batch, slots, SelfContext(num_forwards=num_forwards))
    assert len(results) == num_forwards
    assert caches == [None] * num_forwards


@pytest.mark.parametrize("num_forwards", [2, 3])
@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("grad_mode", ["unroll", "em_detach"])
def test_values_and_gradients_equal_the_reference(
    model, batch, slots, coord_ids, num_forwards, mode, grad_mode
):
    settings = SelfContext(num_forwards, mode, grad_mode, temperature=0.5)
    logits = self_context_logits(model, batch, slots, settings)[-1]
    found = gradients(model, loss_of(logits))
    reference = Reference(model, batch, coord_ids)
    expected = reference.logits(num_forwards, mode, detach=grad_mode == "em_detach", temperature=0.5)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    assert_same_gradients(found, gradients(model, loss_of(expected)))


def test_unroll_and_em_detach_differ_in_gradient_only(model, batch, slots):
    unroll, em_detach = (
        self_context_logits(model, batch, slots, SelfContext(2, "soft", mode))[-1]
        for mode in ("unroll", "em_detach")
    )
    assert torch.equal(unroll, em_detach)
    through, cut = gradients(model, loss_of(unroll)), gradients(model, loss_of(em_detach))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert (through[name] - cut[name]).norm() > 1e-6 * cut[name].norm()


@pytest.mark.parametrize(("grad_mode", "reached"), [("unroll", True), ("em_detach", False)])
def test_first_forward_is_reached_under_unroll_only(model, batch, slots, grad_mode, reached):
    first, last = self_context_logits(model, batch, slots, SelfContext(2, "soft", grad_mode))
    first.retain_grad()
    loss_of(last).backward()
    assert (first.grad is not None and bool(first.grad.any())) is reached
    rows = torch.zeros(BATCH * LENGTH, dtype=torch.bool)
    rows[slots.rows_N] = True
    if reached:  # and only in the rows that predict the slots
        assert torch.equal(first.grad.flatten(0, 1).ne(0).any(-1), rows)


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_soft(coord_ids):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(10, 6, generator=g, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(5, 10, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 6, generator=g, dtype=torch.float64)
    out, grads = {}, {}
    for mode in ("soft", "st", "hard"):
        out[mode] = slot_embeddings(table, logits, SelfContext(2, mode))
        grads[mode] = torch.autograd.grad((out[mode] * weights).sum(), [table, logits], allow_unused=True)
    assert torch.equal(out["st"], out["hard"])
    assert torch.equal(out["hard"], table[logits.argmax(-1)])
    assert not torch.allclose(out["soft"], out["hard"])
    for st, soft in zip(grads["st"], grads["soft"], strict=True):
        torch.testing.assert_close(st, soft)
    assert grads["hard"][1] is None


def test_straight_through_in_the_model(model, batch, slots):
    st, hard = (self_context_logits(model, batch, slots, SelfContext(2, mode))[-1] for mode in ("st", "hard"))
    assert torch.equal(st, hard)


def decoder_inputs(model: nn.Module, run) -> list[Tensor]:
    """Embeddings [B, T, H] that entered the decoder in each forward of `run()`, image features in place."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["soft", "st", "hard"])
def test_rows_beside_the_slots_are_bit_identical(model, batch, slots, mode):
    first, second = decoder_inputs(
        model, lambda: self_context_logits(model, batch, slots, SelfContext(2, mode))
    )
    changed = (first != second).any(-1).flatten()
    is_image = (batch["input_ids"] == model.config.image_token_id).flatten()
    assert is_image.sum() == 4 * BATCH
    assert not changed[is_image].any()
    assert set(changed.nonzero().flatten().tolist()) == set(slots.positions_N.tolist())


def test_hooks_on_the_embedding_apply_to_every_row_and_to_the_coordinate_table(
    model, batch, slots, coord_ids
):
    offset = torch.linspace(-1, 1, 32, dtype=torch.float64)
    is_coord = torch.zeros(model.config.text_config.vocab_size, dtype=torch.float64)
    is_coord[coord_ids] = 1.0

    def add_offset(_module, args, embeds):
        return embeds + is_coord[args[0]].unsqueeze(-1) * offset

    handle = model.get_input_embeddings().register_forward_hook(add_offset)
    hooked = self_context_logits(model, batch, slots, SOFT_UNROLL)
    handle.remove()
    with torch.no_grad():
        head = model.lm_head
        head.weight = nn.Parameter(head.weight.clone())  # the offset is not on the head
        model.get_input_embeddings().weight[coord_ids] += offset
    baked = self_context_logits(model, batch, slots, SOFT_UNROLL)
    for left, right in zip(hooked, baked, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_frozen_embedding_with_gradient_checkpointing(model, batch, slots, coord_ids):
    model.get_input_embeddings().weight.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    logits = self_context_logits(model, batch, slots, SOFT_UNROLL)[-1]
    found = gradients(model, loss_of(logits))
    expected = Reference(model, batch, coord_ids).logits(2, "soft")
    assert_same_gradients(found, gradients(model, loss_of(expected)))


def test_middle_forwards_of_em_detach_carry_no_gradient(model, batch, slots):
    results = self_context_logits(model, batch, slots, SelfContext(3, "soft", "em_detach"))
    assert [logits.requires_grad for logits in results] == [True, False, True]


def test_no_slots_change_nothing(model, batch, coord_ids):
    none = CoordSlots(torch.zeros(0, dtype=torch.int64), coord_ids)
    first, second = self_context_logits(model, batch, none, SOFT_UNROLL)
    assert torch.equal(first, second)
    assert gradients(model, loss_of(second))


def test_bf16_expectation_is_taken_in_float32(coord_ids):
    g = torch.Generator().manual_seed(0)
    table, logits = torch.randn(1000, 8, generator=g), 0.1 * torch.randn(4, 1000, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        found = slot_embeddings(table.bfloat16(), logits, SOFT_UNROLL)
    assert found.dtype == torch.float32
    expected = logits.double().softmax(-1) @ table.bfloat16().double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_forward_of_the_caller_gets_the_iteration(model, batch, slots):
    seen = []

    def forward(iteration: int) -> tuple[str, Tensor]:
        seen.append(iteration)
        return f"forward {iteration}", slot_logits(model(**batch, use_cache=False).logits, slots)

    assert run_self_context(model, slots, SelfContext(3), forward) == [f"forward {i}" for i in range(3)]
    assert seen == [0, 1, 2]


def test_model_that_gets_embeddings_instead_of_ids_is_an_error(model, slots):
    embeds = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64)
    logits = torch.zeros(slots.positions_N.numel(), 1000, dtype=torch.float64)
    with (
        pytest.raises(ContractError, match="did not embed token ids"),
        embedded_slots(model, slots, logits, SOFT_UNROLL),
    ):
        model.model.language_model(inputs_embeds=embeds)
