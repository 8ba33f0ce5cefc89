"""Let a model's head compute something else than logits, inside the head's own call.

Logits of all supervised rows need not exist where the loss can be taken from hidden states and head weights. Those
weights may only be there while the head is being called: DeepSpeed ZeRO-3 gathers them before a module's forward (and
those of its parts, as LoRA's base layer, when they are read in it) and partitions them again after it. So the
computation takes the place of the head's `forward`. What it returns is a part of the model's output, its `logits`,
where DDP looks for the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coordexp.errors import ContractError
from coordexp.head.rows import output_head

HeadBody = Callable[[nn.Module, Tensor], Tensor | tuple[Tensor, ...]]
"""(head, hidden states [B, T, H]) -> what the model returns as `logits`."""


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
