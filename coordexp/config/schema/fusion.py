"""The `custom.fusion` section: several data sets in one run, each with its share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from coordexp.config.schema.section import Section

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""Names become parts of metric keys."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


JsonlFiles = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
"""Paths of JSONL files, or patterns of them; one may be written without a list."""


class FusionSource(Section):
    """One data set of the mixture."""

    name: str = Field(
        pattern=f"^{NAME_PATTERN}$",
        description="What logs call it, as in `dataset/<name>/share`: letters, digits and `_ . + -`.",
    )
    train_jsonl: JsonlFiles = Field(
        description="Its training records: a file, a pattern such as `shards/*.jsonl`, or a list of them. Files of a "
        "pattern come in the order of their names."
    )
    val_jsonl: JsonlFiles | None = Field(
        default=None,
        description="Its validation records. Every validation record of every data set is evaluated once; weights do "
        "not matter there.",
    )
    weight: float = Field(
        gt=0,
        description="Its share of the samples, as a part of the sum of all weights: 3 beside 1 is three samples of "
        "four. What `probabilities` are in `datasets.interleave_datasets`, but kept to within one sample at every "
        "moment of the run, not drawn.",
    )


class Fusion(Section):
    """Several data sets in one run, each with its share of the samples; in place of `train_jsonl` and `val_jsonl`."""

    sources: list[FusionSource] = Field(min_length=1, description="The data sets.")
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="Length of an epoch: until the first data set has been shown as a whole, or until every one has "
        "(smaller ones are then shown several times). As in ms-swift and `datasets.interleave_datasets`.",
    )
    samples_per_epoch: int | None = Field(
        default=None,
        gt=0,
        description="Length of an epoch in samples, in place of `stopping_strategy`. The next epoch goes on where this "
        "one ended.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the data sets, in their order."""
        return tuple(source.name for source in self.sources)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the data sets that have validation records."""
        return tuple(source.name for source in self.sources if source.val_jsonl)

    @model_validator(mode="after")
    def _names_differ(self) -> Fusion:
        names = self.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two sources are called {', '.join(twice)}; every data set needs a name of its own, under which it "
                "is logged"
            )
        return self

    @model_validator(mode="after")
    def _no_speck(self) -> Fusion:
        smallest = min(self.sources, key=lambda source: source.weight)
        if smallest.weight * 1_000_000 < sum(source.weight for source in self.sources):
            raise ValueError(
                f"weight {smallest.weight:g} of {smallest.name} is less than a millionth of all; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Fusion:
        if self.samples_per_epoch is not None and "stopping_strategy" in self.model_fields_set:
            raise ValueError(
                "samples_per_epoch and stopping_strategy both say how long an epoch is; keep one of them"
            )
        return self
