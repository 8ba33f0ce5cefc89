"""Let a model's head compute something else than logits, inside the head's own call.

Logits of all supervised rows need not exist where the loss can be taken from hidden states and head weights. Those
weights may only be there while their module is being called: DeepSpeed ZeRO-3 gathers them in a pre-forward hook of
the module that owns them and partitions them again after it. So the computation takes the place of the head's
`forward`, and runs within calls of the parts of the head that own weights (the base layer and the adapters of LoRA).
What it returns is a part of the model's output, in its `logits`, where DDP looks for the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coordexp.errors import ContractError
from coordexp.models.supervised_rows import output_head

HeadBody = Callable[[nn.Module, Tensor], Tensor]
"""(head, hidden states [B, T, H]) -> what the model returns as `logits`."""


@contextmanager
def head_computes(model: nn.Module, body: HeadBody) -> Iterator[None]:
    """Within this context the first forward of `model` returns `body(head, hidden_BTH)` as its logits.

    `body` may read the weights of the head and call it: by then every replaced forward is back in place. Forward
    hooks on the head see the result of `body` in place of logits.

    Args:
        model: a model with `get_output_embeddings`, unwrapped from DDP or DeepSpeed.

    Raises:
        ContractError: the model never called its head within the context.
    """
    head = output_head(model)
    was_called = False

    def compute(hidden_BTH: Tensor) -> Tensor:
        nonlocal was_called
        was_called = True
        parts = [part for part in head.modules() if part is not head and _owns_weights(part)]
        return _within_calls(parts, hidden_BTH, lambda hidden: body(head, hidden))

    restore = _replace_forward(head, compute)
    try:
        yield
    finally:
        restore()
    if not was_called:
        raise ContractError(
            f"the forward of {type(model).__name__} did not call its head, inside which the loss is taken; expected "
            "one that computes its logits from `get_output_embeddings()`. Is another fused loss on (use_liger_kernel)?"
        )


def _within_calls(modules: Sequence[nn.Module], hidden: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
    """body(hidden), run inside nested calls of `modules`, so that their hooks hold around it."""
    if not modules:
        return body(hidden)
    outer, *inner = modules
    restore = _replace_forward(outer, lambda x: _within_calls(inner, x, body))
    try:
        result: Tensor = outer(hidden)
    finally:
        restore()
    return result


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """`forward` takes the place of module.forward for one call. Returns what undoes it (harmless if undone)."""
    own: dict[str, Any] = vars(module)
    before = own.get("forward")  # an earlier override of this instance, as accelerate makes them

    def restore() -> None:
        if own.get("forward") is once:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before

    def once(x: Tensor) -> Tensor:
        restore()
        return forward(x)

    own["forward"] = once
    return restore


def _owns_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
