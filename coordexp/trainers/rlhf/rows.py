"""Rows of `swift rlhf`: the question of stage 1, the record for the rewards, and what a teacher is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordexp.config.contradictions.rlhf import ANSWER
from coordexp.data.dataset import RowMaker

TEACHER_COLUMN = "teacher_prompt"
"""ms-swift's name for the user message that a teacher sees in place of the student's."""


@dataclass(frozen=True)
class TaughtRows:
    """Makes the rows of `maker`, each with the message that its teacher is asked.

    teacher_prompt: user message in which `ANSWER` stands for the true answer, as the model would write it.
    """

    maker: RowMaker
    teacher_prompt: str

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """As `RowMaker`, a transform of a `datasets.Dataset`."""
        rows = self.maker(columns)
        if "messages" in rows:
            pairs = zip(rows["messages"], rows["images"], strict=True)
            rows[TEACHER_COLUMN] = [
                self._message(turns[-1]["content"], len(images)) for turns, images in pairs
            ]
        return rows

    def _message(self, answer: str, num_images: int) -> str:
        text = self.teacher_prompt.replace(ANSWER, answer)
        prompt = self.maker.prompt.model_copy(update={"user": text})
        return prompt.messages(num_images)[-1]["content"]
