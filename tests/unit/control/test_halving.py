"""Work that is halved when memory runs out: once at a time, kept, counted, and refused the second time in a row."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.control.halving import Halving, halved
from coordexp.errors import DeviceMemoryError


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Every retry collects garbage; what other tests of this process left need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class NoMemoryError(Exception):
    """What the allocator of these tests raises."""


class Work:
    """Takes pieces of up to `room` items."""

    def __init__(self, room: int, least: int = 1) -> None:
        self.room, self.sizes, self.retries, self.freed = room, list[int](), 0, 0
        self.pieces = Halving(
            "sorting", "the_setting", error=NoMemoryError, free=self._free, on_retry=self._count, least=least
        )

    def _free(self) -> None:
        self.freed += 1

    def _count(self) -> None:
        self.retries += 1

    def __call__(self, full: int) -> int:
        def attempt(size: int) -> int:
            self.sizes.append(size)
            if size > self.room:
                raise NoMemoryError(f"no room for {size}")
            return full

        return self.pieces.run(full, attempt)


@pytest.mark.parametrize(
    ("size", "least", "failed", "expected"),
    [(8, 1, False, 4), (7, 1, False, 3), (1, 1, False, None), (8, 1, True, None), (10, 8, False, 8)],
)
def test_the_next_size(size: int, least: int, failed: bool, expected: int | None):
    assert halved(size, least=least, has_failed_before=failed) == expected


def test_the_smaller_size_stays_and_every_retry_is_counted_but_said_once(caplog: pytest.LogCaptureFixture):
    work = Work(room=8)
    with caplog.at_level(logging.WARNING):
        assert [work(8), work(16), work(16), work(5)] == [8, 16, 16, 5]
        assert work.sizes == [8, 16, 8, 8, 2]  # 5 items in pieces of half their number
        work.room = 4
        assert work(16) == 16
    assert (work.sizes[-2:], work.retries, work.freed) == ([8, 4], 2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "sorting: memory ran out with pieces of 16; tried again with 8, which stays. (Said once; "
        "health/oom_retries_total counts.) Lower the_setting."
    ]


def test_the_second_failure_in_a_row_ends_it():
    work = Work(room=3)
    said = r"sorting: memory ran out with pieces of 9 and of 4 \(no room for 4\). Lower the_setting."
    with pytest.raises(DeviceMemoryError, match=said):
        work(9)
    assert (work.sizes, work.retries) == ([9, 4], 1)


def test_what_cannot_be_halved_ends_at_once():
    work = Work(room=0)
    with pytest.raises(DeviceMemoryError, match=r"with pieces of 1 \(no room for 1\)"):
        work(1)
    assert work.retries == 0


def test_other_errors_pass_through():
    def attempt(size: int) -> int:
        raise KeyError("another")

    with pytest.raises(KeyError):
        Work(room=8).pieces.run(8, attempt)


@given(st.lists(st.integers(1, 64), min_size=1), st.integers(1, 64))
def test_no_piece_is_larger_than_asked_for_and_none_grows_back(jobs: list[int], room: int):
    work, parts = Work(room), 1
    for full in jobs:
        before = len(work.sizes)
        try:
            work(full)
        except DeviceMemoryError:
            assert work.sizes[-1] > room
            return
        tried = work.sizes[before:]
        assert tried[0] == max(1, full // parts) <= full
        assert tried[-1] <= room
        parts *= len(tried)  # 1 where the first try did it, 2 after a retry
