"""Work in pieces, where memory may run out: a piece is halved and tried again, once. No torch.

    pieces = Halving("decoding", "rollout_matching.decode_batch_size", error=OutOfMemory)
    answers = pieces.run(len(batch), lambda size: decode(batch, size))

A second failure in a row ends the run with what was tried. Whatever works at the smaller size stays at it. Only for
work of one rank: where ranks compute together, one that tries again on its own would leave the others waiting.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

from coordexp.errors import DeviceMemoryError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
OnRetry = Callable[[], None]


def halved(size: int, *, least: int, has_failed_before: bool) -> int | None:
    """The size to try after memory ran out at `size`; None where it is not tried again.

    has_failed_before: the try before this one failed too.
    """
    return None if has_failed_before or size <= least else max(least, size // 2)


class Halving:
    """The pieces of one kind of work.

    Arguments:
        what: the work, in messages.  lower: what a person can lower.
        error: what running out of memory raises.
        free: gives back what the failed try held, before the next one.
        on_retry: told of every retry, to count it.
        least: pieces are never smaller.
    """

    def __init__(
        self,
        what: str,
        lower: str,
        *,
        error: type[Exception],
        free: Callable[[], None] = lambda: None,
        on_retry: OnRetry = lambda: None,
        least: int = 1,
    ) -> None:
        self._what, self._lower, self._error = what, lower, error
        self._free, self._on_retry, self._least = free, on_retry, least
        self._parts = 1
        self._has_said = False

    def size(self, full: int) -> int:
        """Of the next pieces, where `full` would be taken with memory enough."""
        return min(full, max(self._least, full // self._parts))

    def run(self, full: int, attempt: Callable[[int], Result]) -> Result:
        """`attempt(size)`, which does all the work in pieces of at most `size` and leaves nothing when it fails.

        Raises:
            DeviceMemoryError: memory ran out twice in a row, or with the smallest piece.
        """
        size, tried = self.size(full), list[int]()
        while True:
            try:
                return attempt(size)
            except self._error as error:
                said = str(error)  # the error itself would keep the tensors of the try alive
            tried.append(size)
            smaller = halved(size, least=self._least, has_failed_before=len(tried) > 1)
            if smaller is None:
                raise DeviceMemoryError(
                    f"{self._what}: memory ran out with pieces of {' and of '.join(map(str, tried))} ({said}). Lower "
                    f"{self._lower}."
                )
            gc.collect()
            self._free()
            self._parts *= 2
            self._say(size, smaller)
            self._on_retry()
            size = smaller

    def _say(self, size: int, smaller: int) -> None:
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "%s: memory ran out with pieces of %d; tried again with %d, which stays. (Said once; "
                "health/oom_retries_total counts.) Lower %s.",
                self._what,
                size,
                smaller,
                self._lower,
            )
