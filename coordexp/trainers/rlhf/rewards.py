"""`coordexp_f1`, `coordexp_iou`, `coordexp_format` and `coordexp_no_duplicates` for `swift rlhf --reward_funcs`."""

from __future__ import annotations

from functools import lru_cache

from coordexp.codec.coord_vocab import Tokenizer
from coordexp.codec.forms.choose import form_of
from coordexp.config import Prompt
from coordexp.data.dataset import RECORD_COLUMN
from coordexp.data.store.columns import record_from_text
from coordexp.eval.rewards import REWARDS, Rewards, rewards_of
from coordexp.swift_bridge.rewards import RewardedAnswer, Score, register_reward

_ANSWERS_KEPT = 4096  # of the last batches: every reward function asks about the same answers


class RewardJudge:
    """Parses answers and compares them with their record, each once.

    tok: of the model.  prompt: says the form of its answers.
    """

    def __init__(self, tok: Tokenizer, prompt: Prompt) -> None:
        self._tok = tok
        self._form = form_of(prompt.answer_form, prompt.object_field_order)
        self._cached = lru_cache(maxsize=_ANSWERS_KEPT)(self._judge)

    def rewards(self, answer: RewardedAnswer) -> Rewards:
        """Of an answer whose row is the text of a record."""
        return self._cached(answer)

    def _judge(self, answer: RewardedAnswer) -> Rewards:
        parsed = self._form.parse(answer.token_ids, self._tok)
        return rewards_of(parsed, record_from_text(answer.row).objects, ended=answer.ended)


def register_rewards(tok: Tokenizer, prompt: Prompt) -> None:
    """Make the four reward functions known to ms-swift."""
    judge = RewardJudge(tok, prompt)
    for name, field in REWARDS.items():
        register_reward(name, _score(judge, Rewards._fields.index(field)), column=RECORD_COLUMN)


def _score(judge: RewardJudge, index: int) -> Score:
    def score(answer: RewardedAnswer) -> float:
        return judge.rewards(answer)[index]

    return score
