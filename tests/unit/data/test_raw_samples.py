"""How many samples an epoch of stage 2 has. (What they hold is checked in real runs.)"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.data.raw_samples import RawSamples
from coordexp.data.shown import InTurn, ShownRows
from coordexp.swift_bridge.draws import Draw


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 3))
def test_an_epoch_is_whole_steps_and_holds_every_row(num_rows, per_step, epoch):
    order = InTurn(num_rows, multiple_of=per_step)
    assert len(order) % per_step == 0
    assert num_rows <= len(order) < num_rows + per_step
    found = [order.at(Draw(index, epoch)) for index in range(len(order))]
    assert order.rows_in(epoch).tolist() == [row for row, _ in found]
    assert [row for row, _ in found[:num_rows]] == list(range(num_rows))
    assert [row for row, _ in found[num_rows:]] == [index % num_rows for index in range(num_rows, len(order))]
    assert len(set(found)) == len(found)  # a row that is shown again has another turn


def test_there_is_nothing_behind_the_end():
    samples = RawSamples(ShownRows([0, 1, 2], order=InTurn(3, multiple_of=2)), None)
    assert len(samples) == 4
    with pytest.raises(IndexError, match="sample 4 of 4"):
        samples[4]
