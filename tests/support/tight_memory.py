"""An allocator that fails on demand: torch's own OutOfMemoryError from the operation that makes a tensor too large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TightMemory(TorchDispatchMode):
    """Within this context an operation whose new tensor `does_not_fit` fails, at most `times` times.

    does_not_fit: told the shape and the number of the operation, from 0.
    """

    def __init__(self, does_not_fit: Callable[[torch.Size, int], bool], times: int = 1) -> None:
        super().__init__()
        self._does_not_fit, self._left = does_not_fit, times
        self.num_operations = 0
        self.num_failures = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        number = self.num_operations
        self.num_operations += 1
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and self._left > 0 and self._does_not_fit(made.shape, number):
                self._left -= 1
                self.num_failures += 1
                raise torch.OutOfMemoryError(f"{func}: no room for {tuple(made.shape)}")
        return result
