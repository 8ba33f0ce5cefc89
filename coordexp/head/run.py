"""Loss of the supervised rows of a forward, through the plain or the fused head (`custom.head`).

    plain   the head is called as a module on the supervised rows; their logits [R, V] are kept for the backward
    fused   the loss and its gradients are taken inside the head's call, a chunk of rows at a time
    auto    fused where the logits would exceed PLAIN_BYTES in float32 (256 MiB: 440 rows of a vocabulary of 152k)
            and products run in a dtype the fused head takes; otherwise the rows in one piece

All ways give the same loss, gradients and metrics. Beside the loss, or instead of it, a forward can return coordinate
logits of chosen rows, from which self-context makes the embeddings of the next forward.

The fused head can do so because the objective's denominators are known before the forward: it computes each chunk's
gradient while the chunk is still there,

    logits of the chunk -> per-row numbers (LossInputs) -> objective -> its gradient -> gradient of the
    logits, written over them -> added to the gradients of hidden states and head

Its memory is one [chunk, V] buffer, and its matrix products are as many as in the plain head (three). The backward pass
only scales what the forward computed, so it needs no weights (they may be partitioned again by then), and works once,
to first order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from coordexp.control.halving import Halving, OnRetry
from coordexp.errors import ConfigError, ContractError
from coordexp.head.atom_gradients import HeadProbe
from coordexp.head.call import head_computes, head_on_rows
from coordexp.head.fused import FUSED_DTYPES, FusedHead, Observer
from coordexp.head.liger import choose_kernel
from coordexp.head.projection import HeadProjection, projection_of
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows

Terms = TypeVar("Terms")
HeadMode = Literal["auto", "plain", "fused"]
CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}
"""Size of the logits buffer of the fused head, by device type."""
PLAIN_BYTES = 256 * 2**20
"""`auto` builds logits of up to this size in one piece."""
LEAST_CHUNK_ROWS = 8
"""Chunks are not halved below this."""
Objective = Callable[[LossInputs], tuple[Tensor, Terms]]
RunModel = Callable[[], Any]
"""Runs the model; returns what comes out of its head."""


@dataclass(frozen=True)
class Supervised(Generic[Terms]):
    """An objective on some rows of a forward; `needs`, `objective`, `observe` as for `apply_head`."""

    rows: SupervisedRows
    needs: LossNeeds
    objective: Objective[Terms]
    observe: Observer | None = None
    restart: Callable[[], None] | None = None
    """Makes `observe` forget, before all rows are seen anew; without it, memory that runs out is an error at once."""
    probe: HeadProbe | None = None
    """Sees the head and the hidden states of `rows`, in the head's call and before the loss is taken."""


@dataclass(frozen=True)
class HeadResult(Generic[Terms]):
    """What one forward gave."""

    loss: Tensor | None
    """0-dim; None without an objective."""
    terms: list[Terms]
    """One entry per chunk, at least one; none without an objective."""
    slot_logits_NK: Tensor | None
    """float [N, K], with graph; None when no slots were asked for."""


class RowsHead:
    """Runs a model, and an objective on the supervised rows of its hidden states.

    Arguments:
        mode: `custom.head`.
        columns: the coordinate tokens.
        on_retry: told when the fused head ran out of memory and goes on with smaller chunks.
    """

    def __init__(self, mode: HeadMode, columns: CoordColumns, on_retry: OnRetry = lambda: None) -> None:
        self.mode, self.columns = mode, columns
        self._pieces = Halving(
            "the fused head, which computes chunks of rows",
            "packing_length or per_device_train_batch_size",
            error=torch.OutOfMemoryError,
            free=torch.cuda.empty_cache,
            on_retry=on_retry,
            least=LEAST_CHUNK_ROWS,
        )

    def __call__(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        inputs: dict[str, Any],
        rows: SupervisedRows,
        needs: LossNeeds,
        objective: Objective[Terms],
        observe: Observer | None = None,
        restart: Callable[[], None] | None = None,
        probe: HeadProbe | None = None,
    ) -> tuple[Tensor, list[Terms]]:
        """One forward: the loss, 0-dim, and the terms of each chunk. Arguments as for `run` and `Supervised`."""
        supervised = Supervised(rows, needs, objective, observe, restart, probe)
        result = self.run(model, unwrapped, inputs, supervised)
        if result.loss is None:
            raise ContractError("the forward gave no loss although it had an objective")
        return result.loss, result.terms

    def run(
        self,
        model: nn.Module,
        unwrapped: nn.Module,
        inputs: dict[str, Any],
        supervised: Supervised[Terms] | None,
        slot_rows_N: Tensor | None = None,
    ) -> HeadResult[Terms]:
        """One forward without a cache.

        Arguments:
            model: called with `inputs`; may be wrapped (DDP, DeepSpeed). `unwrapped` is the model inside.
            supervised: its objective divides by counts that are known before the forward. None: no loss.
            slot_rows_N: int64 [N], rows b * T + t of the flattened hidden states whose coordinate logits are wanted
                (`CoordSlots.rows_N`); the graph of those holds no row of V logits with the fused head.
        """
        if supervised is None and slot_rows_N is None:
            raise ContractError(
                "RowsHead.run: neither an objective nor slot rows were given; there is nothing to do"
            )

        def forward() -> Any:
            return model(**inputs, use_cache=False).logits

        run = self._plain if self.mode == "plain" else self._in_head
        return run(forward, unwrapped, supervised, slot_rows_N)

    def _plain(
        self,
        forward: RunModel,
        unwrapped: nn.Module,
        supervised: Supervised[Terms] | None,
        slot_rows_N: Tensor | None,
    ) -> HeadResult[Terms]:
        parts = [] if supervised is None else [supervised.rows.positions_R]
        parts += [] if slot_rows_N is None else [slot_rows_N]
        probe = None if supervised is None else supervised.probe
        watched: AbstractContextManager[None] = nullcontext()
        if supervised is not None and probe is not None:

            def look_first(head: nn.Module, hidden_SH: Tensor) -> Tensor:
                probe(head, hidden_SH[: supervised.rows.num_rows])
                logits_SV: Tensor = head.forward(hidden_SH)  # its hooks run around this call
                return logits_SV

            watched = head_computes(unwrapped, look_first)
        with head_on_rows(unwrapped, torch.cat(parts)), watched:
            logits_RV = forward()
        num_slots = 0 if slot_rows_N is None else slot_rows_N.numel()
        rows_RV, slots_NV = logits_RV.split([logits_RV.shape[0] - num_slots, num_slots])
        slots_NK = None if slot_rows_N is None else self.columns.take(slots_NV)
        if supervised is None:
            return HeadResult(None, [], slots_NK)
        loss, terms = self._from_logits(rows_RV, supervised)
        return HeadResult(loss, [terms], slots_NK)

    def _in_head(
        self,
        forward: RunModel,
        unwrapped: nn.Module,
        supervised: Supervised[Terms] | None,
        slot_rows_N: Tensor | None,
    ) -> HeadResult[Terms]:
        """Everything with a graph leaves the head as its output: there wrappers look for what a backward needs."""
        parts: list[Terms] = []

        def body(head: nn.Module, hidden_BTH: Tensor) -> tuple[Tensor, ...]:
            hidden_SH = hidden_BTH.flatten(0, 1)
            outputs = []
            if supervised is not None:
                loss, terms = self._loss(head, hidden_SH, supervised)
                parts.extend(terms)
                outputs.append(loss)
            if slot_rows_N is not None:
                outputs.append(self._slot_logits(head, hidden_SH.index_select(0, slot_rows_N)))
            return tuple(outputs)

        with head_computes(unwrapped, body):
            outputs = forward()
        return HeadResult(
            None if supervised is None else outputs[0], parts, None if slot_rows_N is None else outputs[-1]
        )

    def _loss(
        self, head: nn.Module, hidden_SH: Tensor, supervised: Supervised[Terms]
    ) -> tuple[Tensor, list[Terms]]:
        rows, needs = supervised.rows, supervised.needs
        hidden_RH = hidden_SH.index_select(0, rows.positions_R)
        if supervised.probe is not None:
            supervised.probe(head, hidden_RH)
        projection = self._projection(head, hidden_RH)
        if projection is None:
            loss, terms = self._from_logits(head(hidden_RH), supervised)
            return loss, [terms]
        objective = _without_autocast(supervised.objective, hidden_RH.device.type)
        return apply_head(
            projection,
            rows,
            self.columns,
            needs,
            objective,
            mode=self.mode,
            observe=supervised.observe,
            pieces=self._pieces,
            restart=supervised.restart,
        )

    def _slot_logits(self, head: nn.Module, hidden_NH: Tensor) -> Tensor:
        projection = self._projection(head, hidden_NH)
        return (
            self.columns.take(head(hidden_NH))
            if projection is None
            else projection.coord_logits(self.columns)
        )

    def _from_logits(self, logits_RV: Tensor, supervised: Supervised[Terms]) -> tuple[Tensor, Terms]:
        if supervised.observe is not None:
            supervised.observe(logits_RV.detach(), supervised.rows)
        objective = _without_autocast(supervised.objective, logits_RV.device.type)
        return objective(LossInputs.from_logits(logits_RV, supervised.rows, self.columns, supervised.needs))

    def _projection(self, head: nn.Module, hidden_RH: Tensor) -> HeadProjection | None:
        """The head as tensors; None where `auto` meets a head that is no sum of products (quantised, DoRA)."""
        try:
            return projection_of(head, hidden_RH)
        except ConfigError:
            if self.mode == "fused":
                raise
            return None


def _without_autocast(objective: Objective[Terms], device_type: str) -> Objective[Terms]:
    """The objective in the dtype of its inputs, also inside the forward of a model under autocast."""

    def exact(inputs: LossInputs) -> tuple[Tensor, Terms]:
        with torch.autocast(device_type, enabled=False):
            return objective(inputs)

    return exact


def apply_head(
    projection: HeadProjection,
    rows: SupervisedRows,
    columns: CoordColumns,
    needs: LossNeeds,
    objective: Objective[Terms],
    *,
    mode: HeadMode = "auto",
    chunk_rows: int | None = None,
    observe: Observer | None = None,
    liger: bool = True,
    pieces: Halving | None = None,
    restart: Callable[[], None] | None = None,
) -> tuple[Tensor, list[Terms]]:
    """Loss of the rows, 0-dim, and the terms of each chunk (at least one; merge them).

    Arguments:
        projection: hidden states of exactly `rows`, in their order, and the head.
        needs: what `objective` looks at.
        objective: maps the inputs of some rows to their share of the loss and detached terms. It must be
            a sum over rows (or boxes) divided by counts that are known beforehand.
        mode: `custom.head`; `auto` takes the fused head when logits would exceed PLAIN_BYTES and their
            dtype is one of FUSED_DTYPES.
        chunk_rows: rows per chunk of the fused head; by default what fits in CHUNK_BYTES.
        observe: called with the logits [r, V] of each chunk and its rows, for metrics on whole rows; it may
            neither change nor keep the logits.
        liger: let liger-kernel serve the text rows where it can (`head.liger`). The objective is then called
            twice on them, and must be linear in their cross-entropy.
        pieces: what happens where memory runs out in the fused head; None: it is raised. `restart` as for `Supervised`.
    """
    if mode not in get_args(HeadMode):
        raise ConfigError(f"custom.head = {mode!r}: expected one of {', '.join(get_args(HeadMode))}")
    if _choose(mode, projection, rows, columns) == "fused":
        size = chunk_rows or default_chunk_rows(projection)
        kernel = choose_kernel(projection, needs, observe) if liger else None
        head = FusedHead(
            projection, rows, columns, needs, objective, chunk_rows=size, observe=observe, text_kernel=kernel,
            pieces=pieces, restart=restart,
        )  # fmt: skip
        return head.loss(), head.terms
    logits_RV = projection.logits(columns)
    if observe is not None:
        observe(logits_RV.detach(), rows)
    loss, terms = objective(LossInputs.from_logits(logits_RV, rows, columns, needs))
    return loss, [terms]


def default_chunk_rows(projection: HeadProjection) -> int:
    """Rows whose float32 logits fit in CHUNK_BYTES: a multiple of 32, at least 32."""
    budget = CHUNK_BYTES.get(projection.hidden_RH.device.type, CHUNK_BYTES["cuda"])
    return max(budget // (4 * projection.vocab_size) // 32 * 32, 32)


def _choose(
    mode: HeadMode, projection: HeadProjection, rows: SupervisedRows, columns: CoordColumns
) -> HeadMode:
    if rows.num_rows == 0 or projection.vocab_size == columns.num_bins:
        return "plain"  # nothing to save
    if mode == "auto":
        is_large = 4 * rows.num_rows * projection.vocab_size > PLAIN_BYTES
        return "fused" if is_large and projection.compute_dtype() in FUSED_DTYPES else "plain"
    return mode
