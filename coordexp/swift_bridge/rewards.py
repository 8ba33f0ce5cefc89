"""Reward functions of ours under the names that `swift rlhf --rlhf_type grpo --reward_funcs NAME` looks up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swift.rewards import ORM, orms

from coordexp.errors import ContractError


@dataclass(frozen=True)
class RewardedAnswer:
    """What a reward function sees of one answer.

    token_ids: of the answer, its end token included.  ended: whether it stopped by itself.
    row: a column of the data set that the answer is judged by.
    """

    token_ids: tuple[int, ...]
    ended: bool
    row: Any


Score = Callable[[RewardedAnswer], float]


def register_reward(name: str, score: Score, *, column: str) -> None:
    """Let `--reward_funcs NAME` give every answer what `score` returns, logged as `rewards/NAME/mean`.

    column: of the data set, handed over as `row`.
    """

    def call(self: ORM, completions: Sequence[Any], **columns: Any) -> list[float]:
        return [score(answer) for answer in _answers(columns, column)]

    orms[name] = type(name, (ORM,), {"__call__": call, "__doc__": score.__doc__})


def _answers(columns: dict[str, Any], column: str) -> list[RewardedAnswer]:
    return [
        RewardedAnswer(_of_one_turn(token_ids), reason != "length", row)
        for token_ids, reason, row in zip(
            columns["response_token_ids"], columns["finish_reason"], columns[column], strict=True
        )
    ]


def _of_one_turn(token_ids: Sequence[Any]) -> tuple[int, ...]:
    """ms-swift lists the ids of an answer, or, where a scheduler asked several times, those of every turn."""
    if not token_ids:
        raise ContractError("ms-swift handed over an answer without its token ids; expected return_details")
    if isinstance(token_ids[0], int):
        return tuple(token_ids)
    if len(token_ids) != 1:
        raise ContractError(f"an answer of {len(token_ids)} turns; expected one (no multi_turn_scheduler)")
    return tuple(token_ids[0])
