"""What is said about one metric key: `MetricSpec`, its kind, and how it is reduced. No torch.

Every key is defined once, beside its constant, in one of the `keys_*` files; `catalog.lookup` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Better = Literal["higher", "lower"]
"""Which way a number should go."""


class Kind(StrEnum):
    """What sort of number a key holds."""

    COUNTER = "counter"
    """How many; a total over the logging window and all ranks."""
    GAUGE = "gauge"
    """A level or a mean: comparable across batch sizes."""
    LOSS = "loss"
    """A gauge that is a term of the objective, or of a loss-like diagnostic."""
    RATE = "rate"
    """A fraction of summed numerators over summed denominators."""
    SECONDS = "seconds"
    """Wall-clock time."""
    FLAG = "flag"
    """1.0 or 0.0."""
    PERCENTILE = "percentile"
    """A tail value (p90, p99) of something counted per sample or token."""


class Reduce(StrEnum):
    """How the values of a key become one number, over the micro-steps of the window and all ranks."""

    SUM = "sum"
    """Sum of the values."""
    MEAN = "mean"
    """Sum of the sums over sum of the counts; where each addition counts once, the mean over additions."""
    RATIO = "ratio"
    """Sum of the numerators over sum of the denominators; both must be given."""
    MAX = "max"
    """Largest value."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One key of the catalogue.

    `key` is the name in training logs (evaluation prefixes `eval_`); `pattern` the family it belongs to, or
    the key itself; `when` says on which steps it is present, since an absent number is never logged as 0;
    `over` names what the counts of a mean are; `better` which way it should go, None where no direction is the
    better one.
    """

    key: str
    unit: str
    kind: Kind
    reduce: Reduce
    in_loss: bool
    when: str
    meaning: str
    over: str = "micro-steps"
    pattern: str = ""
    source: str = "coordexp"
    better: Better | None = None

    @property
    def family(self) -> str:
        """The pattern the key belongs to: the key itself where it has no family."""
        return self.pattern or self.key


DEFAULT_REDUCE = {
    Kind.COUNTER: Reduce.SUM,
    Kind.GAUGE: Reduce.MEAN,
    Kind.LOSS: Reduce.MEAN,
    Kind.RATE: Reduce.RATIO,
    Kind.SECONDS: Reduce.MAX,
    Kind.FLAG: Reduce.MAX,
    Kind.PERCENTILE: Reduce.MEAN,
}

DEFAULT_BETTER: dict[Kind, Better] = {Kind.LOSS: "lower", Kind.SECONDS: "lower"}


class KeySection:
    """A titled group of keys, in the order in which the reference shows them."""

    def __init__(self, title: str, intro: str = "") -> None:
        self.title = title
        self.intro = intro
        self.specs: dict[str, MetricSpec] = {}

    def __iter__(self) -> Iterator[MetricSpec]:
        return iter(self.specs.values())

    def define(
        self,
        key: str,
        kind: Kind,
        meaning: str,
        *,
        unit: str = "1",
        when: str = "every step",
        in_loss: bool = False,
        reduce: Reduce | None = None,
        over: str = "micro-steps",
        pattern: str = "",
        source: str = "coordexp",
        better: Better | None = None,
    ) -> str:
        """Add one key and return it, so that constant and meaning are written in one place.

        Raises:
            ValueError: the key is already defined in this section.
        """
        if key in self.specs:
            raise ValueError(f"metric key {key!r} is defined twice in section {self.title!r}")
        chosen = reduce if reduce is not None else DEFAULT_REDUCE[kind]
        direction = better if better is not None else DEFAULT_BETTER.get(kind)
        self.specs[key] = MetricSpec(
            key, unit, kind, chosen, in_loss, when, meaning, over, pattern, source, direction
        )
        return key
