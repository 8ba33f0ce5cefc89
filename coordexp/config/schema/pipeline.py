"""The stage-2 module lists: `pipeline.objective` and `pipeline.diagnostics`, and the identity of a pipeline.

Every entry states name, enabled, weight, channels and exactly the config keys of its module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coordexp.config.schedules.points import (
    SIGMA,
    SIGMA_PER_SIDE,
    WARMUP,
    PositiveOrPoints,
    PositiveOrPointsOrNull,
    Warmup,
    check_warmup,
)
from coordexp.config.schema.section import Section

Weight = Annotated[float, Field(ge=0)]
Channels = Annotated[list[Literal["A", "B"]], Field(min_length=1)]


class TokenCeConfig(Section):
    """Weights of the cross-entropy on text tokens, by what the token is."""

    desc_ce_weight: Weight = Field(description="Descriptions of ground truth (channel A).")
    self_context_struct_ce_weight: Weight = Field(
        description="Structure and end token of the last self-context forward (channel A)."
    )
    rollout_fn_desc_weight: Weight = Field(description="Descriptions of appended missed objects (channel B).")
    rollout_matched_prefix_struct_weight: Weight = Field(
        description="Structure of matched objects in the prefix (channel B). 0 in rollout-aligned training, "
        "which teaches coordinates alone there; 1 is its ablation."
    )
    rollout_drop_invalid_struct_ce_multiplier: float = Field(
        ge=1,
        le=4,
        description="Factor on appended structure in samples that dropped an invalid object (channel B).",
    )
    rollout_matched_desc_weight: Weight = Field(
        default=0.0,
        description="Names of matched objects in the prefix (channel B): each token up to the first that is not the "
        "true name's, and there the true one.",
    )


class BboxGeoConfig(Section):
    """Weights of the losses on decoded boxes."""

    smoothl1_weight: Weight = Field(description="Smooth L1 on box corners in [0, 1].")
    ciou_weight: Weight = Field(description="1 - CIoU.")


class CoordRegConfig(Section):
    """Weights of the losses on coordinate distributions."""

    coord_ce_weight: Weight = Field(description="Hard cross-entropy over the bins (temperature 1).")
    coord_el1_weight: Weight = Field(description="Expected absolute error.")
    coord_ehuber_weight: Weight = Field(description="Expected Huber error.")
    coord_huber_delta: float = Field(gt=0, description="Huber threshold, as a fraction of the axis.")
    coord_entropy_weight: Weight = Field(description="Entropy of the distribution.")
    coord_gate_weight: Weight = Field(
        description="Mass leak out of the coordinate vocabulary at coordinate slots."
    )
    text_gate_weight: Weight = Field(description="Mass leak into the coordinate vocabulary at text slots.")
    soft_ce_weight: Weight = Field(description="Cross-entropy against a Gaussian target.")
    self_context_soft_ce_weight: Weight = Field(description="The same, added in channel A only.")
    w1_weight: Weight = Field(description="Wasserstein-1 distance.")
    temperature: float = Field(gt=0, description="Divides the coordinate logits.")
    target_sigma: PositiveOrPoints = Field(description=SIGMA)
    target_sigma_per_side: PositiveOrPointsOrNull = Field(default=None, description=SIGMA_PER_SIDE)
    target_truncate: float | None = Field(
        ge=0, description="Target is 0 beyond this distance in bins; null: no cut."
    )


class CoordDiagConfig(Section):
    """`coord_diag` takes no settings."""


class _Module(Section):
    enabled: bool = Field(description="Whether the module runs.")
    weight: Weight = Field(description="Factor on everything the module adds.")
    channels: Channels = Field(description="Channels it runs in: A, B or both.")

    @model_validator(mode="after")
    def _channels_once(self) -> _Module:
        if len(set(self.channels)) != len(self.channels):
            raise ValueError("channels lists a channel twice")
        return self

    def runs_in(self, channel: str) -> bool:
        """Whether the module adds something in a channel."""
        return self.enabled and self.weight > 0 and channel in self.channels


class _ObjectiveModule(_Module):
    config: Section
    warmup: Warmup = Field(default={}, description=WARMUP)

    @model_validator(mode="after")
    def _warms_up_what_acts(self) -> _ObjectiveModule:
        check_warmup(self.warmup, self.weights())
        return self

    def weights(self) -> dict[str, float]:
        """The weights by name: `weight`, which is on everything, and those of the config."""
        config = self.config
        names = [name for name in type(config).model_fields if name.endswith("_weight")]
        return {"weight": self.weight, **{name: getattr(config, name) for name in names}}


class TokenCeModule(_ObjectiveModule):
    """Cross-entropy on text tokens."""

    name: Literal["token_ce"]
    config: TokenCeConfig


class BboxGeoModule(_ObjectiveModule):
    """Losses on boxes decoded from the coordinate distributions."""

    name: Literal["bbox_geo"]
    config: BboxGeoConfig


class CoordRegModule(_ObjectiveModule):
    """Losses on the coordinate distributions."""

    name: Literal["coord_reg"]
    config: CoordRegConfig


class CoordDiagModule(_Module):
    """Monitors of the coordinate distributions; never in the loss."""

    name: Literal["coord_diag"]
    config: CoordDiagConfig


ObjectiveModule = Annotated[TokenCeModule | BboxGeoModule | CoordRegModule, Field(discriminator="name")]
OBJECTIVE_MODULES: dict[str, type[_ObjectiveModule]] = {
    "token_ce": TokenCeModule,
    "bbox_geo": BboxGeoModule,
    "coord_reg": CoordRegModule,
}
DIAGNOSTIC_MODULES: dict[str, type[_Module]] = {"coord_diag": CoordDiagModule}


class Pipeline(Section):
    """Ordered lists of objective and diagnostics modules."""

    objective: list[ObjectiveModule] = Field(
        min_length=1, description="Modules that make the loss, in order."
    )
    diagnostics: list[CoordDiagModule] = Field(default=[], description="Modules that only watch.")

    @model_validator(mode="after")
    def _rules(self) -> Pipeline:
        for entries in (self.objective, self.diagnostics):
            names = [entry.name for entry in entries]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"module {repeated[0]} is listed twice; one entry a module")
        names = [entry.name for entry in self.objective]
        if {"bbox_geo", "coord_reg"} <= set(names) and names.index("coord_reg") < names.index("bbox_geo"):
            raise ValueError("coord_reg stands before bbox_geo; list bbox_geo first")
        self._refuse_what_cannot_act()
        return self

    def _refuse_what_cannot_act(self) -> None:
        token_ce = next((entry for entry in self.objective if isinstance(entry, TokenCeModule)), None)
        coord_reg = next((entry for entry in self.objective if isinstance(entry, CoordRegModule)), None)
        for channel in ("A", "B"):
            gated = (
                coord_reg is not None and coord_reg.runs_in(channel) and coord_reg.config.text_gate_weight > 0
            )
            if gated and (token_ce is None or not token_ce.runs_in(channel)):
                raise ValueError(
                    "text_gate_weight acts on rows that token_ce supervises, which is off in channel "
                    f"{channel}; enable token_ce there or set the weight to 0"
                )
        if token_ce is None or token_ce.runs_in("B"):
            return
        for name, off in (
            ("rollout_drop_invalid_struct_ce_multiplier", 1),
            ("rollout_matched_desc_weight", 0),
        ):
            if vars(token_ce.config)[name] != off:
                raise ValueError(f"{name} acts in channel B, where token_ce is off; set it to {off}")


def pipeline_identity(pipeline: Pipeline, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two pipelines the same experiment; an optional key at its default is no part of it.

    extra: the semantic settings outside the lists: `variant`, `stage2_ab.coord_ctx_embed_mode`,
    `stage2_ab.coord_decode_mode`, `rollout_matching.coord_decode_mode`, where they apply.
    """
    return {
        "objective": [entry.model_dump(exclude_defaults=True) for entry in pipeline.objective],
        "diagnostics": [entry.model_dump(exclude_defaults=True) for entry in pipeline.diagnostics],
        "extra": dict(extra),
    }


def pipeline_checksum(pipeline: Pipeline, extra: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `pipeline_identity`; run name, seed, paths and key order do not matter."""
    return canonical_hash(pipeline_identity(pipeline, extra))


def canonical_hash(value: object) -> str:
    """sha256 (hex) of a value as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
