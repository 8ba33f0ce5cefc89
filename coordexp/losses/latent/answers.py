"""Which place of its answer a supervised row predicts, counted from the first token that the answer's form leaves open.

Every answer of a form begins with the same tokens (`{"objects": [{"desc": "`); to get those right is no achievement.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordexp.losses.inputs import IGNORE_INDEX, SupervisedRows


def first_open(answer: Sequence[int], opening: Sequence[int]) -> int:
    """The first place where `answer` is no longer `opening`: what the model decides first. At most its last token."""
    for place, token_id in enumerate(answer):
        if place >= len(opening) or token_id != opening[place]:
            return place
    return max(len(answer) - 1, 0)


def answer_places(labels_BT: Tensor, rows: SupervisedRows, opening: Sequence[int]) -> Tensor:
    """int64 [R]: the place of each row's target in its answer, 0 for the first open token, negative before it.

    labels_BT: unshifted, one sample a row; `rows` are those of these labels. On the host.
    """
    is_answer_BT = labels_BT != IGNORE_INDEX
    starts = [
        first_open(labels_T[is_T].tolist(), opening)
        for labels_T, is_T in zip(labels_BT, is_answer_BT, strict=True)
    ]
    places_BT = is_answer_BT.cumsum(1) - 1 - torch.tensor(starts).unsqueeze(1)
    return places_BT.flatten()[rows.positions_R + 1]


def within(places_R: Tensor, num_tokens: int | None) -> Tensor:
    """bool [R]: the first `num_tokens` places from the first open token on; None: every row."""
    if num_tokens is None:
        return torch.ones_like(places_R, dtype=torch.bool)
    return (places_R >= 0) & (places_R < num_tokens)
