"""What a stage-2 objective is made of: the entries of `pipeline`, as plain values.

`config.schema.pipeline` says what may be written and checks it; nothing is checked again here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordexp.config.schema.pipeline import Pipeline

CHANNELS = ("A", "B")


@dataclass(frozen=True)
class TokenCE:
    """`token_ce`: cross-entropy of text tokens, weighted by what the token is."""

    desc_ce_weight: float
    """Descriptions of ground truth (channel A)."""
    self_context_struct_ce_weight: float
    """Scale of the structure cross-entropy of the last self-context forward (channel A, atom A2_text)."""
    rollout_fn_desc_weight: float
    """Descriptions of appended missed objects (channel B)."""
    rollout_matched_prefix_struct_weight: float
    """Structure of matched predictions in the prefix (channel B)."""
    rollout_drop_invalid_struct_ce_multiplier: float
    """Factor on the structure of appended objects, in samples that dropped an invalid prediction (B)."""


@dataclass(frozen=True)
class BboxGeo:
    """`bbox_geo`: losses on boxes decoded from the coordinate distributions."""

    smoothl1_weight: float
    ciou_weight: float


@dataclass(frozen=True)
class CoordReg:
    """`coord_reg`: losses on the coordinate distributions, and the text gate."""

    coord_ce_weight: float
    coord_el1_weight: float
    coord_ehuber_weight: float
    coord_huber_delta: float
    """In units of the image side."""
    coord_entropy_weight: float
    coord_gate_weight: float
    text_gate_weight: float
    soft_ce_weight: float
    self_context_soft_ce_weight: float
    """Added to soft_ce_weight in channel A."""
    w1_weight: float
    temperature: float
    """T of the coordinate distribution, for this module, box decoding and coord_diag alike."""
    target_sigma: float
    target_truncate: float | None


@dataclass(frozen=True)
class CoordDiag:
    """`coord_diag`: monitors of the coordinate distributions; no settings."""


_MODULES: dict[str, type[Any]] = {
    "token_ce": TokenCE,
    "bbox_geo": BboxGeo,
    "coord_reg": CoordReg,
    "coord_diag": CoordDiag,
}


@dataclass(frozen=True)
class ModuleSpec:
    """One entry of a module list."""

    name: str
    enabled: bool
    weight: float
    channels: tuple[str, ...]
    config: TokenCE | BboxGeo | CoordReg | CoordDiag

    def weight_in(self, channel: str) -> float:
        """Weight of the module in a channel, 0 where it is off."""
        return self.weight if self.enabled and channel in self.channels else 0.0


@dataclass(frozen=True)
class ObjectiveSpec:
    """The objective and diagnostics lists of a run, in order. At most one entry per module."""

    objective: tuple[ModuleSpec, ...]
    diagnostics: tuple[ModuleSpec, ...] = ()

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline) -> ObjectiveSpec:
        """The values of the settings section, which is where they were checked."""
        return cls(
            tuple(_spec(entry.model_dump()) for entry in pipeline.objective),
            tuple(_spec(entry.model_dump()) for entry in pipeline.diagnostics),
        )

    def find(self, name: str) -> ModuleSpec | None:
        """The entry of a module, enabled or not; None if it is not listed."""
        return next((entry for entry in self.objective + self.diagnostics if entry.name == name), None)


def _spec(entry: dict[str, Any]) -> ModuleSpec:
    config = _MODULES[entry["name"]](**entry["config"])
    return ModuleSpec(**entry | {"channels": tuple(entry["channels"]), "config": config})
