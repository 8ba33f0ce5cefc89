"""One store for every metric: takes (key, sum, count) on the device, reduces over the window and all ranks.

Adding costs no kernel and no host sync: tensors are kept by reference and added up in blocks. `flush` is
where the host waits. One packed collective then gathers every key from every rank, plus two more on the rare
flush where some rank holds a key that was never gathered before. All ranks make the same collectives whatever
keys they hold, so different key sets cannot hang.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from coordexp.errors import ContractError
from coordexp.metrics.catalog import EVAL_PREFIX, is_helper, resolve
from coordexp.metrics.keys_run import NONFINITE_METRICS_TOTAL
from coordexp.metrics.spec import MetricSpec, Reduce

logger = logging.getLogger(__name__)

Number = float | int | Tensor
SumAndCount = tuple[float, float]

MODES = ("train", "eval")
_ABSENT: SumAndCount = (0.0, 0.0)
_BLOCK = 256  # pending tensors of one total before they are added up on their device


class MetricStore:
    """Sums of every metric since the last flush: one window for training, one for evaluation.

    Args:
        device: where the collective runs; None means the current CUDA device under NCCL, else the CPU.
        strict: whether an unknown key is an error; None reads COORDEXP_STRICT_METRICS.
    """

    def __init__(self, device: torch.device | str | None = None, *, strict: bool | None = None) -> None:
        self._device = device
        self._strict = strict
        self._windows: dict[str, dict[str, _Cell]] = {mode: {} for mode in MODES}
        self._layouts: dict[str, list[str]] = {mode: [] for mode in MODES}  # equal on every rank
        self._specs: dict[str, MetricSpec] = {}
        self._reported: set[str] = set()
        self._is_paused = False

    def add(self, key: str, sum: Number, count: Number | None = None, *, mode: str = "train") -> None:
        """Add one value, or a sum over `count` items, to a key under its training name.

        Counters, seconds, flags and maxima use `sum` alone. For means `count` is the weight (1 when left
        out); for rates `sum` is the numerator and `count` the denominator, which must be given. Tensors are
        0-dim, stay on their device, and must not be changed in place afterwards.

        Raises:
            ContractError: a rate without a denominator; an unknown key in strict mode; a tensor that is not
                0-dim; a mode other than train or eval.
        """
        if is_helper(key) or self._is_paused:
            return
        cell = self._cell(key, mode)
        reduce = cell.spec.reduce
        if reduce is Reduce.RATIO and count is None:
            raise ContractError(
                f"metric {key!r} is a rate: pass its numerator and its denominator ({cell.spec.over}), so "
                "that both can be summed over micro-steps and ranks."
            )
        cell.total.add(key, sum)
        cell.count.add(key, count if count is not None and reduce in (Reduce.MEAN, Reduce.RATIO) else 1.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context nothing is added: what is computed again for another rank's sake."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def add_all(self, mapping: Mapping[str, Number | tuple[Number, Number]], *, mode: str = "train") -> None:
        """`add` for every entry of the mapping: a number, or a (sum, count) pair."""
        for key, value in mapping.items():
            total, count = value if isinstance(value, tuple) else (value, None)
            self.add(key, total, count, mode=mode)

    def flush(self, mode: str = "train") -> dict[str, float]:
        """Reduce the window over all ranks, empty it, and return one number per key that was present.

        Collective: every rank of the default process group calls it, with the same mode. Evaluation keys get
        the prefix `eval_`. Values that are not finite are left out, counted, and named once on the console.
        """
        local = _to_host(self._window(mode))
        self._windows[mode] = {}
        prefix = EVAL_PREFIX if mode == "eval" else ""
        reduced: dict[str, float] = {}
        num_nonfinite = 0
        for key, per_rank in self._gather(local, self._layouts[mode]).items():
            value = _reduce(self._spec(key).reduce, per_rank)
            if value is None:
                continue
            if math.isfinite(value):
                reduced[prefix + key] = value
            else:
                num_nonfinite += 1
                self._report_nonfinite(prefix + key, value)
        if num_nonfinite:
            reduced[prefix + NONFINITE_METRICS_TOTAL] = float(num_nonfinite)
        return reduced

    def _window(self, mode: str) -> dict[str, _Cell]:
        if mode not in self._windows:
            raise ContractError(f"metrics mode {mode!r}; expected 'train' or 'eval'.")
        return self._windows[mode]

    def _cell(self, key: str, mode: str) -> _Cell:
        window = self._window(mode)
        if key not in window:
            window[key] = _Cell(self._spec(key))
        return window[key]

    def _spec(self, key: str) -> MetricSpec:
        if key not in self._specs:
            self._specs[key] = resolve(key, strict=self._strict)
        return self._specs[key]

    def _gather(self, local: dict[str, SumAndCount], layout: list[str]) -> dict[str, list[SumAndCount]]:
        """The pair of every key on every rank. `layout` grows by the union of keys new to any rank."""
        if not (dist.is_available() and dist.is_initialized()):
            return {key: [pair] for key, pair in local.items()}
        unseen = set(local) - set(layout)
        rows = self._all_gather(_pack(local, layout, bool(unseen)))
        if any(row[0] for row in rows):
            layout.extend(_union_over_ranks(unseen))
            rows = self._all_gather(_pack(local, layout, False))
        return {key: [(row[1 + 2 * i], row[2 + 2 * i]) for row in rows] for i, key in enumerate(layout)}

    def _all_gather(self, packed: list[float]) -> list[list[float]]:
        row = torch.tensor(packed, dtype=torch.float64, device=self._collective_device())
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)
        return [gathered.tolist() for gathered in rows]

    def _collective_device(self) -> torch.device:
        if self._device is not None:
            return torch.device(self._device)
        if "nccl" in dist.get_backend():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _report_nonfinite(self, key: str, value: float) -> None:
        if key not in self._reported:
            self._reported.add(key)
            logger.warning("metric %s is %s and was left out of the log (said once per key).", key, value)


class _Cell:
    """What one key has gathered since the last flush, on this rank."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self.total = _Total(largest=spec.reduce is Reduce.MAX)
        self.count = _Total(largest=False)


class _Total:
    """A running sum, or maximum, of Python numbers (on the host) and 0-dim tensors (on their device)."""

    def __init__(self, *, largest: bool) -> None:
        self.largest = largest
        self.host = -math.inf if largest else 0.0
        self.pending: list[Tensor] = []
        self.folded: Tensor | None = None  # float64 0-dim: the tensors of earlier blocks

    def add(self, key: str, value: Number) -> None:
        if not isinstance(value, Tensor):
            self.host = self._join(self.host, float(value))
            return
        if value.ndim != 0:
            raise ContractError(f"metric {key!r}: a tensor of shape {tuple(value.shape)}; expected 0-dim.")
        self.pending.append(_alone(value.detach()))
        if len(self.pending) >= _BLOCK:
            self.fold()

    def fold(self) -> None:
        """Add the pending tensors up on their device; no host sync."""
        if not self.pending:
            return
        same_dtype = len({value.dtype for value in self.pending}) == 1
        block = torch.stack(
            self.pending if same_dtype else [value.double() for value in self.pending]
        ).double()
        if self.folded is not None:
            block = torch.cat([block, self.folded[None]])
        self.folded = block.amax() if self.largest else block.sum()
        self.pending = []

    def merged(self, on_device: float | None) -> float:
        return self.host if on_device is None else self._join(self.host, on_device)

    def _join(self, left: float, right: float) -> float:
        return _largest([left, right]) if self.largest else left + right


def _alone(value: Tensor) -> Tensor:
    """`value`, copied if it is a view that would keep a large tensor alive."""
    return value.clone() if value.untyped_storage().nbytes() > 512 else value


def _to_host(window: dict[str, _Cell]) -> dict[str, SumAndCount]:
    """The (sum or max, count) of every key, with one transfer per device."""
    totals = [total for cell in window.values() for total in (cell.total, cell.count)]
    by_device: dict[torch.device, list[_Total]] = {}
    for total in totals:
        total.fold()
        if total.folded is not None:
            by_device.setdefault(total.folded.device, []).append(total)
    fetched: dict[int, float] = {}
    for group in by_device.values():
        values = torch.stack([total.folded for total in group if total.folded is not None]).tolist()
        fetched.update(zip(map(id, group), values, strict=True))
    return {
        key: (cell.total.merged(fetched.get(id(cell.total))), cell.count.merged(fetched.get(id(cell.count))))
        for key, cell in window.items()
    }


def _pack(local: dict[str, SumAndCount], layout: list[str], has_unseen: bool) -> list[float]:
    """[1 + 2 * len(layout)]: whether this rank holds keys outside the layout, then every key's pair."""
    return [float(has_unseen), *(number for key in layout for number in local.get(key, _ABSENT))]


def _union_over_ranks(keys: set[str]) -> list[str]:
    gathered: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, keys)
    return sorted(set().union(*gathered))


def _reduce(reduce: Reduce, per_rank: list[SumAndCount]) -> float | None:
    """One number from the pairs of all ranks; None when no rank had the key."""
    present = [pair for pair in per_rank if pair[1] != 0]
    if not present:
        return None
    totals = [total for total, _ in present]
    if reduce is Reduce.MAX:
        return _largest(totals)
    if reduce is Reduce.SUM:
        return sum(totals)
    denominator = sum(count for _, count in present)
    return sum(totals) / denominator if denominator else None


def _largest(values: list[float]) -> float:
    """max that lets NaN through."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
