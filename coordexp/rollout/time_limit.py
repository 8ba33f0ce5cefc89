"""Time that a backend has, and the setting that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError


@dataclass(frozen=True)
class TimeLimit:
    """Seconds from now that a backend has for what comes next. None: no limit.

    key: the setting that holds the limit.
    """

    seconds: float | None
    key: str
    start: float = field(default_factory=time.monotonic)

    def check(self, backend: str, batch: str) -> None:
        """RolloutError when the time is over."""
        left = self.left()
        if left is not None and left < 0:
            raise self.exceeded(f"{backend} backend: {batch}")

    def left(self) -> float | None:
        """Seconds that remain, negative when the time is over; None without a limit."""
        return None if self.seconds is None else self.start + self.seconds - time.monotonic()

    def exceeded(self, what: str) -> RolloutError:
        """The error that says that `what` has taken too long."""
        return RolloutError(
            f"{what} took longer than {self.seconds:g} s ({self.key}). Is the device shared with another process? "
            "Lower decode_batch_size or max_new_tokens beside it, or raise the limit."
        )


def generate_limit(settings: RolloutMatching) -> TimeLimit:
    """`generate_timeout_s` from now, under the name that the run file has for it."""
    return TimeLimit(settings.generate_timeout_s, f"{settings.where}.generate_timeout_s")


def no_limit() -> TimeLimit:
    """All the time that it takes."""
    return TimeLimit(None, "no limit")
