"""One rank of test_zero3.py, started by torchrun: MODEL_DIR OUTPUT_FILE."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import support.gloo_deepspeed  # noqa: F401
import torch
from deepspeed.utils import safe_get_full_grad
from support.self_context import slot_logits
from support.stage1_head import ALL_TERMS, Batch, forward, load, make_batch, with_lora
from torch import nn

from coordexp.head import run as head_settings
from coordexp.head.run import HeadResult, RowsHead, Supervised
from coordexp.losses.inputs import LossInputs
from coordexp.losses.stage1 import atom_losses, atom_names, combine, stage1_terms
from coordexp.models.coord_offset import attach_coord_offset
from coordexp.models.self_context import CoordSlots, SelfContext, run_self_context
from coordexp.trainers.step.gradient_probe import GradientProbe

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # every weight is cut up
}


LoadModel = Callable[[], nn.Module]
Step = Callable[[nn.Module, nn.Module], torch.Tensor]
"""(model as it is called, the model inside) -> loss."""


def sharded(model: nn.Module, step: Step) -> dict[str, torch.Tensor]:
    """Gradients of the second of two steps under ZeRO-3, and its loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=ZERO3)
    for _ in range(2):
        loss = step(engine, engine.module)
        engine.backward(loss)
        grads = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters() if p.requires_grad}
        engine.step()
    return {**grads, "loss": loss.detach()}


def whole(model: nn.Module, step: Step) -> dict[str, torch.Tensor]:
    """Gradients of a step of the model on its own, and its loss."""
    loss = step(model, model)
    loss.backward()
    return {
        **{n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        "loss": loss.detach(),
    }


def with_offset(model: nn.Module, batch: Batch) -> nn.Module:
    """The coord-offset adapter with one table, not zero, on a tied model."""
    offset = attach_coord_offset(model, batch.columns.ids, tie_head=True)
    torch.manual_seed(5)
    torch.nn.init.normal_(offset.embedding.coord_offset_KH, std=0.05)
    return model


def slots_of(batch: Batch) -> CoordSlots:
    """All coordinate tokens of the batch."""
    coord_ids = torch.tensor(batch.columns.ids)
    positions = torch.isin(batch.inputs["input_ids"].flatten(), coord_ids).nonzero().flatten()
    return CoordSlots(positions, coord_ids)


def head_unroll_step(batch: Batch, mode: str, probed: dict[str, float]) -> Step:
    """The stage-1 objective on both forwards of unrolled self-context, through a head that also gives slot logits.

    probed: filled with what the gradient probe says of the step, over both ranks.
    """
    slots, rows, head = slots_of(batch), batch.rows, RowsHead(mode, batch.columns)
    probe = GradientProbe(1, batch.columns, torch.device("cpu"), probed.update)
    losses = partial(atom_losses, weights=ALL_TERMS, text_count=rows.num_text, coord_count=rows.num_coord)

    def objective(inputs: LossInputs) -> tuple[torch.Tensor, None]:
        return combine(stage1_terms(inputs, ALL_TERMS), rows.num_text, rows.num_coord), None

    def step(model: nn.Module, unwrapped: nn.Module) -> torch.Tensor:
        def run(_iteration: int) -> tuple[HeadResult[None], torch.Tensor | None]:
            look = probe.watch(0, atom_names(ALL_TERMS), rows, ALL_TERMS.needs(), losses)
            supervised = Supervised(rows, ALL_TERMS.needs(), objective, probe=look)
            result = head.run(model, unwrapped, batch.inputs, supervised, slots.rows_N)
            return result, result.slot_logits_NK

        first, last = run_self_context(unwrapped, slots, SelfContext(num_forwards=2), run)
        probe.on_step_end(None, None, None)
        return first.loss + 2.0 * last.loss

    return step


def self_context_step(batch: Batch) -> Step:
    """A loss on both forwards of unrolled self-context at the coordinate tokens of the batch."""
    slots = slots_of(batch)

    def step(model: nn.Module, unwrapped: nn.Module) -> torch.Tensor:
        def run(_iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
            logits_BTV = model(**batch.inputs, use_cache=False).logits
            return logits_BTV, slot_logits(logits_BTV, slots)

        first, last = run_self_context(unwrapped, slots, SelfContext(num_forwards=2), run)
        return first.log_softmax(-1)[..., 5].mean() + last.log_softmax(-1)[..., 7].mean()

    return step


def main() -> None:
    model_dir, output = Path(sys.argv[1]), Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    batch = make_batch(model_dir)
    head_settings.CHUNK_BYTES["cpu"] = 0  # the smallest chunks

    def through_head(mode: str) -> Step:
        return lambda model, unwrapped: forward(model, unwrapped, batch, mode)[0]

    models: dict[str, LoadModel] = {
        "tied": lambda: load(model_dir),
        "lora": lambda: with_lora(load(model_dir, tied=False), target_modules=["q_proj", "lm_head"]),
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, make in models.items():
        found[f"{name} whole"] = whole(make(), through_head("plain"))
        for mode in ("plain", "fused"):
            found[f"{name} {mode}"] = sharded(make(), through_head(mode))
    numbers: dict[str, dict[str, float]] = {name: {} for name in ("whole", "plain", "fused")}
    step = head_unroll_step(batch, "plain", numbers["whole"])
    found["head unroll whole"] = whole(with_offset(load(model_dir), batch), step)
    for mode in ("plain", "fused"):
        model = with_offset(load(model_dir), batch)
        found[f"head unroll {mode}"] = sharded(model, head_unroll_step(batch, mode, numbers[mode]))
    for name, probed in numbers.items():
        found[f"probe {name}"] = {key: torch.tensor(value) for key, value in probed.items()}
    found["self-context whole"] = whole(load(model_dir), self_context_step(batch))
    found["self-context sharded"] = sharded(load(model_dir), self_context_step(batch))
    if torch.distributed.get_rank() == 0:
        torch.save(found, output)


main()
