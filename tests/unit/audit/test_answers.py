"""What can be asked of an answer that holds anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coordexp.audit.answers import Answered


def test_an_answer_is_taught_up_to_a_placeholder_of_a_picture():
    """An untrained model writes any token; a forward takes no picture's place without the picture."""
    backend: Any = SimpleNamespace(template=SimpleNamespace(image_token_id=7, video_token_id=8))
    job: Any = None
    answered = Answered(job, backend, None, {})
    assert answered.teachable([1, 2, 7, 3, 8]) == [1, 2]
    assert answered.teachable([8, 1]) == []
    assert answered.teachable([1, 2, 3]) == [1, 2, 3]
