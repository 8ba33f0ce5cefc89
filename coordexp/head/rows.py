"""Run the language-model head on supervised rows only.

`logits_to_keep` of transformers keeps the same columns of every sequence, so padding and prompt rows of a ragged
batch still reach the head. A forward pre-hook on the output embedding keeps exactly the rows that a loss needs:
hidden states [B, T, H] -> [R, H] -> logits [R, V]. The head is still called as a module, so LoRA on the head,
tied embeddings and parameter gathering of DeepSpeed ZeRO-3 keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from coordexp.errors import ConfigError


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits; ConfigError when the model has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{type(model).__name__} has no output embedding (lm_head); the coordinate objective needs a causal "
            "language model such as Qwen3-VL."
        )
    return head


@contextmanager
def head_on_rows(model: nn.Module, positions_R: Tensor) -> Iterator[None]:
    """Within this context the head of `model` sees only the given rows, and logits come out as [R, V].

    Args:
        model: a model with `get_output_embeddings`, unwrapped from DDP or DeepSpeed.
        positions_R: int64 [R], rows b * T + t of the flattened hidden states [B * T, H].
    """

    def keep_rows(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH, *rest = args
        return (hidden_BTH.flatten(0, 1).index_select(0, positions_R), *rest)

    handle = output_head(model).register_forward_pre_hook(keep_rows)
    try:
        yield
    finally:
        handle.remove()
