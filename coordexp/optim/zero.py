"""How DeepSpeed's ZeRO 1 and 2 cut the matrices of Muon."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from coordexp.optim.matrices import FlatMatrices, Matrix, stacked


def zero_layouts(zero: Any, pieces: Mapping[torch.Tensor, int]) -> dict[torch.Tensor, FlatMatrices]:
    """Flat partition of this rank -> how the matrices lie in it, for each group of Muon.

    Args:
        zero: DeepSpeed's `DeepSpeedZeroOptimizer` (ZeRO 1 and 2), around the optimizer.
        pieces: parameters of the model that hold several matrices -> how many.
    """
    layouts = {}
    for number, group in enumerate(zero.optimizer.param_groups):
        if group["algorithm"] != "muon":
            continue
        matrices: list[Matrix] = []
        parameters = zero.round_robin_bit16_groups[number]
        offsets = zero.round_robin_bit16_offsets[number]
        for parameter, offset in zip(parameters, offsets, strict=True):
            matrices += [
                Matrix(offset + one.start, one.rows, one.columns)
                for one in stacked(parameter, pieces.get(parameter, 1)).matrices
            ]
        assert all(one.stop <= following.start for one, following in pairwise(matrices))
        ranks, size = zero.real_dp_process_group[number], int(zero.partition_size[number])
        start = dist.get_rank(group=ranks) * size
        (flat,) = group["params"]
        layouts[flat] = FlatMatrices(tuple(matrices), start, size, ranks)
    return layouts
