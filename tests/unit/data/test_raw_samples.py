"""How many samples an epoch of stage 2 has. (What they hold is checked in real runs.)"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.data.raw_samples import RawSamples


class Rows(list[Any]):
    """Rows that say which of them was looked at."""

    def __getitem__(self, index: Any) -> Any:
        raise LookupError(index)


@given(st.integers(1, 50), st.integers(1, 20))
def test_an_epoch_is_whole_steps_and_holds_every_row(num_rows, per_step):
    samples = RawSamples(Rows(range(num_rows)), None, multiple_of=per_step)
    assert len(samples) % per_step == 0
    assert num_rows <= len(samples) < num_rows + per_step
    looked_at = []
    for index in range(len(samples)):
        with pytest.raises(LookupError) as caught:
            samples[index]
        looked_at.append(caught.value.args[0])
    assert looked_at[:num_rows] == list(range(num_rows))
    assert looked_at[num_rows:] == [index % num_rows for index in range(num_rows, len(samples))]


def test_there_is_nothing_behind_the_end():
    with pytest.raises(IndexError, match="sample 4 of 4"):
        RawSamples(Rows([0, 1, 2]), None, multiple_of=2)[4]
