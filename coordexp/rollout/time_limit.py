"""Time that a backend has, and the setting that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from coordexp.errors import RolloutError

GENERATE_TIMEOUT_KEY = "rollout_matching.generate_timeout_s"
PREFLIGHT_TIMEOUT_KEY = "rollout_matching.preflight_timeout_s"


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
