"""What happens in the call of a model's head: it sees only some rows, or computes something else than logits.

The head is always called as a module, so LoRA on the head, tied embeddings and DeepSpeed ZeRO-3 keep working.

Rows. `logits_to_keep` of transformers keeps the same columns of every sequence, so padding and prompt rows of a ragged
batch still reach the head. A forward pre-hook keeps exactly the rows that a loss needs: hidden states [B, T, H] ->
[R, H] -> logits [R, V].

Something else. Logits of all supervised rows need not exist where the loss can be taken from hidden states and head
weights. Those weights may only be there while the head is being called: DeepSpeed ZeRO-3 gathers them before a module's
forward (and those of its parts, as LoRA's base layer, when they are read in it) and partitions them again after it. So
the computation takes the place of the head's `forward`. What it returns is a part of the model's output, its `logits`,
where DDP looks for the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from coordexp.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HeadBody = Callable[[nn.Module, Tensor], Tensor | tuple[Tensor, ...]]
"""(head, hidden states [B, T, H]) -> what the model returns as `logits`."""


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits; ConfigError when the model has none."""
    head: nn.Module | None = cast("PreTrainedModel", model).get_output_embeddings()
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


@contextmanager
def head_computes(model: nn.Module, body: HeadBody) -> Iterator[None]:
    """Within this context the first forward of `model` returns `body(head, hidden_BTH)` as its logits.

    `body` may read the weights of the head, and call it: by then its own forward is back in place. Forward hooks on
    the head see the result of `body` in place of logits.

    Args:
        model: a model with `get_output_embeddings`, unwrapped from DDP or DeepSpeed.

    Raises:
        ContractError: the model never called its head within the context.
    """
    head = output_head(model)
    own: dict[str, Any] = vars(head)
    before = own.get("forward")  # an earlier override of this instance, as accelerate makes them
    was_called = False

    def restore() -> None:
        if before is None:
            own.pop("forward", None)
        else:
            own["forward"] = before

    def compute(hidden_BTH: Tensor) -> Tensor | tuple[Tensor, ...]:
        nonlocal was_called
        was_called = True
        restore()
        return body(head, hidden_BTH)

    own["forward"] = compute
    try:
        yield
    finally:
        restore()
    if not was_called:
        raise ContractError(
            f"the forward of {type(model).__name__} did not call its head, inside which the loss is taken; expected "
            "one that computes its logits from `get_output_embeddings()`. Is another fused loss on (use_liger_kernel)?"
        )
