"""The fused head where memory runs out: the same loss, gradients and numbers from half the chunk, or a clear end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tight_memory import TightMemory
from torch import Tensor

from coordexp.control.halving import Halving
from coordexp.errors import DeviceMemoryError
from coordexp.head.projection import HeadProjection
from coordexp.head.run import apply_head
from coordexp.head.token_metrics import TokenMetrics
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms

K, V, H, R, CHUNK = 40, 150, 24, 90, 16
COLUMNS = CoordColumns(range(60, 60 + K))
WEIGHTS = Stage1Weights.from_mapping({"ce_weight": 1.0, "gate_weight": 1.0})


class Forward:
    """One use of the head, in float64: rounding cannot hide a chunk that counts twice."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(2)
        targets = torch.randint(0, V, (R,), generator=g)
        coord = torch.rand(R, generator=g) < 0.4
        targets[coord] = 60 + torch.randint(0, K, (int(coord.sum()),), generator=g)
        self.rows = SupervisedRows.from_targets(targets, COLUMNS)
        made = {
            name: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
            for name, shape in {
                "hidden_RH": (R, H), "weight_VH": (V, H), "bias_V": (V,), "lora_Rr": (R, 3),
                "lora_weight_Vr": (V, 3), "coord_offset_KH": (K, H),
            }.items()
        }  # fmt: skip
        self.projection = HeadProjection(**made)
        self.tokens = TokenMetrics(self.rows, COLUMNS)
        self.retries = 0
        self.pieces = Halving(
            "head", "the batch", error=torch.OutOfMemoryError, on_retry=self._count, least=8
        )

    def _count(self) -> None:
        self.retries += 1

    def __call__(self, **options: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
            terms = stage1_terms(inputs, WEIGHTS)
            return combine(terms, torch.tensor(61.0), torch.tensor(47.0)), terms.detach()

        loss, parts = apply_head(
            self.projection, self.rows, COLUMNS, WEIGHTS.needs(), objective, mode="fused",
            **{
                "chunk_rows": CHUNK, "observe": self.tokens.observer, "restart": self.tokens.restart,
                "pieces": self.pieces, **options,
            },
        )  # fmt: skip
        loss.backward()
        grads = {name: tensor.grad for name, tensor in vars(self.projection).items() if tensor is not None}
        numbers = Stage1Terms.merge(parts).metrics() | self.tokens.metrics()
        return loss.detach(), grads, {key: float(n.sum) / float(n.count) for key, n in numbers.items()}


def test_whichever_operation_fails_the_results_are_those_of_enough_memory():
    """Also one between the gradients of a chunk, where some of them have been added already."""
    Forward()()  # what is made once and kept
    with_room = Forward()
    with TightMemory(lambda shape, number: False) as memory:
        loss, grads, numbers = with_room()
    inside, tried = 0, range(0, memory.num_operations, 61)
    for failing in tried:
        forward = Forward()
        with TightMemory(lambda shape, number, failing=failing: number == failing) as memory:
            try:
                tight_loss, tight_grads, tight_numbers = forward()
            except (
                torch.OutOfMemoryError
            ):  # outside the head: in the backward pass, or in what this test adds
                assert forward.retries == 0
                continue
        assert memory.num_failures == forward.retries == 1
        inside += 1
        assert tight_loss.item() == pytest.approx(loss.item(), rel=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(tight_grads[name], grad, rtol=1e-10, atol=1e-12)
        assert tight_numbers == pytest.approx(numbers, rel=1e-6)
    assert inside > 0.7 * len(tried)


def test_chunks_that_stay_too_large_end_the_forward_with_both_sizes():
    forward = Forward()
    with (
        TightMemory(lambda shape, _: shape == (CHUNK, V) or shape == (CHUNK // 2, V), times=9),
        pytest.raises(DeviceMemoryError, match=r"pieces of 16 and of 8 \(.*no room for \(8, 150\)\)\. Lower"),
    ):
        forward()
    assert forward.retries == 1


def test_a_chunk_that_holds_all_rows_is_halved_by_their_number():
    """The chunk asked for is larger than there are rows, so half of it would be all of them again."""
    forward = Forward()
    with TightMemory(lambda shape, _: shape == (forward.rows.num_text, V), times=9) as memory:
        forward(chunk_rows=1000)
    assert (memory.num_failures, forward.retries) == (1, 1)


def test_the_next_forward_starts_with_the_smaller_chunk():
    first, second = Forward(), Forward()
    second.pieces = first.pieces
    with TightMemory(lambda shape, _: shape == (CHUNK, V), times=9) as memory:
        first()
        second()
    assert (memory.num_failures, first.retries) == (1, 1)


def test_an_observer_that_cannot_forget_makes_it_an_error_at_once():
    forward = Forward()
    with TightMemory(lambda shape, _: shape == (CHUNK, V)), pytest.raises(torch.OutOfMemoryError):
        forward(restart=None)
    assert forward.retries == 0
