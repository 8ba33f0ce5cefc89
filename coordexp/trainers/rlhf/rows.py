"""Rows of `swift rlhf`: the question of stage 1, the record for the rewards, and what a teacher is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordexp.codec.records import Record
from coordexp.config.contradictions.rlhf import ANSWER
from coordexp.data.dataset import RECORD_COLUMN, RowMaker
from coordexp.data.store.columns import record_from_text

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
            records = map(record_from_text, rows[RECORD_COLUMN])
            rows[TEACHER_COLUMN] = [
                self._message(turns[-1]["content"], record)
                for turns, record in zip(rows["messages"], records, strict=True)
            ]
        return rows

    def _message(self, answer: str, record: Record) -> str:
        text = self.teacher_prompt.replace(ANSWER, answer)
        prompt = self.maker.prompt.model_copy(update={"user": text})
        return prompt.messages(len(record.images), record.classes)[-1]["content"]
