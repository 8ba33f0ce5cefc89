"""The forwards of a step: of the student, which reads latent vectors or the text, and of the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError, ContractError
from coordexp.head.call import head_computes, head_on_rows
from coordexp.losses.latent.terms import TeacherRows


@dataclass(frozen=True)
class ForwardRows:
    """Logits [R, V] of the supervised rows, and the outputs [r, H] of the layers that were asked for."""

    logits_RV: Tensor
    states: Mapping[int, Tensor]


def run_rows(
    model: nn.Module,
    unwrapped: nn.Module,
    inputs: Mapping[str, Any],
    positions_R: Tensor,
    *,
    layers: Sequence[int] = (),
    state_positions_r: Tensor | None = None,
    placed: AbstractContextManager[None] | None = None,
) -> ForwardRows:
    """One forward without a cache.

    Arguments:
        model: called with `inputs`; may be wrapped (DDP, DeepSpeed). `unwrapped` is the model inside.
        positions_R: rows b * T + t of the flattened hidden states whose logits are wanted.
        layers, state_positions_r: layers of the language model and rows whose outputs are wanted.
        placed: what the forward runs in, `latents_in_place`.
    """
    with (
        placed or nullcontext(),
        head_on_rows(unwrapped, positions_R),
        layer_outputs(unwrapped, layers, state_positions_r) as states,
    ):
        logits_RV = model(**inputs, use_cache=False).logits
    return ForwardRows(logits_RV, states)


@torch.no_grad()
def run_teacher(
    unwrapped: nn.Module,
    inputs: Mapping[str, Any],
    positions_r: Tensor,
    *,
    top_k: int | None,
    temperature: float,
    chunk_rows: int,
    layers: Sequence[int] = (),
    state_positions_r: Tensor | None = None,
) -> tuple[TeacherRows, dict[int, Tensor]]:
    """Distributions over the next token of some rows, and outputs of layers, of the model without its LoRA weights.

    Logits of at most `chunk_rows` rows exist at a time. The model stays in the mode it is in, but dropout is off.
    """
    parts: list[TeacherRows] = []

    def body(head: nn.Module, hidden_BTH: Tensor) -> Tensor:
        hidden_rH = hidden_BTH.flatten(0, 1).index_select(0, positions_r)
        for chunk in hidden_rH.split(chunk_rows):
            parts.append(TeacherRows.of_logits(head(chunk), top_k=top_k, temperature=temperature))
        return hidden_rH[:0]

    was_training = unwrapped.training
    unwrapped.eval()
    try:
        with (
            without_lora(unwrapped),
            layer_outputs(unwrapped, layers, state_positions_r) as states,
            head_computes(unwrapped, body),
        ):
            unwrapped(**inputs, use_cache=False)
    finally:
        unwrapped.train(was_training)
    return TeacherRows.joined(parts), states


def without_lora(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context LoRA weights of `model` take no part; nothing for a model without."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return nullcontext()
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


@contextmanager
def layer_outputs(
    model: nn.Module, layers: Sequence[int], positions_r: Tensor | None
) -> Iterator[dict[int, Tensor]]:
    """The outputs [r, H] of some layers of the language model in the first forward within this context.

    They are filled in when the block ends: under gradient checkpointing layers run again, and must do then what they
    did before, so that nothing is computed in their hooks.
    """
    found: dict[int, Tensor] = {}
    whole: dict[int, Tensor] = {}
    if not layers or positions_r is None:
        yield found
        return

    def hook(index: int) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            whole.setdefault(index, output[0] if isinstance(output, tuple) else output)

        return keep

    modules = language_layers(model, layers)
    handles = [modules[index].register_forward_hook(hook(index)) for index in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if set(whole) != set(layers):
        raise ContractError(f"layers {sorted(set(layers) - set(whole))} did not run in the forward")
    for index, hidden_BTH in whole.items():
        found[index] = hidden_BTH.flatten(0, 1).index_select(0, positions_r)


def language_layers(model: nn.Module, layers: Sequence[int] = ()) -> nn.ModuleList:
    """The layers of a language model; ConfigError where it has none with one of the numbers `layers`."""
    found = [
        module
        for name, module in model.named_modules()
        if name.endswith("language_model.layers") and isinstance(module, nn.ModuleList)
    ]
    if len(found) != 1 or any(index >= len(found[0]) for index in layers):
        number = len(found[0]) if found else 0
        raise ConfigError(
            f"custom.latent_prefix: latent_state_kd names layers {list(layers)}, and the language model has {number}, "
            f"counted from 0."
        )
    return found[0]
