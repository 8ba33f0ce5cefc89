"""Weights on every node under `save_on_each_node`: the one place where a method of a transformers model is replaced.

transformers 5.19 asks a model to write its weights on rank 0 alone (`PreTrainedModel.should_save_on_this_rank`),
whatever the Trainer's `save_on_each_node` says, so that checkpoints of all other nodes lack them. No argument of
`save_pretrained` reaches that decision. tests/unit/swift_bridge/test_each_node.py fails once it is no longer needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def written_here(model: nn.Module) -> Iterator[None]:
    """Within this context `model` writes its weights where `save_pretrained` is told to, on any rank.

    Adapters are written as asked for anyway.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    of_model = vars(model)
    of_model["should_save_on_this_rank"] = bool  # gets `is_main_process` of save_pretrained, and keeps to it
    try:
        yield
    finally:
        del of_model["should_save_on_this_rank"]
