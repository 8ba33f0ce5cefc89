"""What a stage-2 objective is made of: kinds of forwards, module settings, weights of text tokens.

Settings are the entries of `pipeline` as plain values. `config.schema.pipeline` says what may be written and checks it;
nothing is checked again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from coordexp.config.schema.pipeline import Pipeline
from coordexp.control.points import Number, Points, value_at
from coordexp.errors import ContractError
from coordexp.losses.inputs import SupervisedRows, TextRole

CHANNELS = ("A", "B")


class ForwardKind(Enum):
    """Channel of a forward, and the provenance of its text atoms, coordinate atoms and diagnostics."""

    ANCHOR = ("A", "A1_text", None, "A1")
    """First of several channel-A forwards: teacher-forced, text only."""
    SELF_CONTEXT = ("A", "A2_text", "A2_coord", "A2")
    """Last of several channel-A forwards: coordinate slots saw their own expected embeddings."""
    TEACHER_FORCED = ("A", "A1_text", "A2_coord", "A1")
    """The only channel-A forward of a run with one iteration; coordinate atoms keep their A2 names."""
    ROLLOUT = ("B", "B_rollout_text", "B_coord", "B")
    """Channel B: the model's own prefix with the missed objects appended."""

    def __init__(self, channel: str, text: str, coord: str | None, diagnostics: str):
        self.channel = channel
        self.text = text
        self.coord = coord
        self.diagnostics = diagnostics


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
    rollout_matched_desc_weight: float = 0.0
    """Descriptions of matched predictions in the prefix, up to the first token that is not the true name's (B)."""


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
    target_sigma: Number
    target_truncate: float | None
    target_sigma_per_side: Number | None = None

    def at(self, step: int) -> CoordReg:
        """With the numbers of optimizer step `step` in place of points."""
        per_side = self.target_sigma_per_side
        return replace(
            self,
            target_sigma=value_at(step, self.target_sigma),
            target_sigma_per_side=None if per_side is None else value_at(step, per_side),
        )


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
    warmup: Mapping[str, Points] = field(default_factory=dict)
    """Factors on `weight` and on weights of the config, by their names."""

    def at(self, step: int, knobs: Mapping[str, float] | None = None) -> ModuleSpec:
        """The entry as optimizer step `step` runs it.

        knobs: weights that a controller has in force in place of the configured ones: `coord_reg.w1_weight`.
        """
        config = self.config.at(step) if isinstance(self.config, CoordReg) else self.config
        weights: dict[str, Any] = {
            name: (knobs or {}).get(f"{self.name}.{name}", weight)
            * value_at(step, self.warmup.get(name, 1.0))
            for name, weight in self.weights().items()
        }
        weight = weights.pop("weight")
        return replace(self, weight=weight, config=replace(config, **weights), warmup={})

    def in_force(self, step: int, knobs: Mapping[str, float] | None = None) -> dict[str, float]:
        """Value at a step of every setting that can change over the run, by its name."""
        of_step = self.at(step, knobs)
        values = of_step.weights()
        names = [*self.warmup, *(name for name in values if f"{self.name}.{name}" in (knobs or {}))]
        for entry in fields(self.config):
            if isinstance(getattr(self.config, entry.name), Sequence):  # points
                values[entry.name] = getattr(of_step.config, entry.name)
                names.append(entry.name)
        return {name: values[name] for name in dict.fromkeys(names)}

    def weights(self) -> dict[str, float]:
        """`weight` and the weights of the config, by name."""
        names = [entry.name for entry in fields(self.config) if entry.name.endswith("_weight")]
        return {"weight": self.weight, **{name: getattr(self.config, name) for name in names}}

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

    def at(self, step: int, knobs: Mapping[str, float] | None = None) -> ObjectiveSpec:
        """The lists as optimizer step `step` runs them. knobs: see `ModuleSpec.at`."""
        return replace(self, objective=tuple(entry.at(step, knobs) for entry in self.objective))

    def in_force(self, step: int, knobs: Mapping[str, float] | None = None) -> dict[tuple[str, str], float]:
        """Value at a step of every setting that can change over the run, by module and name."""
        return {
            (entry.name, name): value
            for entry in self.objective
            for name, value in entry.in_force(step, knobs).items()
        }

    def find(self, name: str) -> ModuleSpec | None:
        """The entry of a module, enabled or not; None if it is not listed."""
        return next((entry for entry in self.objective + self.diagnostics if entry.name == name), None)


def _spec(entry: dict[str, Any]) -> ModuleSpec:
    config = _MODULES[entry["name"]](**entry["config"])
    return ModuleSpec(**entry | {"channels": tuple(entry["channels"]), "config": config})


# --- weights of text tokens ---


@dataclass(frozen=True)
class TextWeights:
    """How each text row takes part in a forward."""

    ce_R: Tensor
    """float [num_text]: weight w_t of the row's cross-entropy."""
    is_desc_R: Tensor
    """bool [num_text]: counts as `desc_ce`."""
    is_matched_desc_R: Tensor
    """bool [num_text]: counts as `matched_desc_ce`; what is neither is `struct_ce`."""
    gated_R: Tensor
    """bool [num_text]: the text gate acts on it."""


class TextWeighting:
    """`token_ce` settings -> weights.

    | role           | A1              | A2 | B                                          |
    |----------------|-----------------|----|--------------------------------------------|
    | STRUCT         | 1               | 1  | 1, or the drop-invalid multiplier          |
    | DESC           | desc_ce_weight  | 0  | rollout_fn_desc_weight                     |
    | MATCHED_STRUCT | 0               | 0  | rollout_matched_prefix_struct_weight       |
    | MATCHED_DESC   | 0               | 0  | rollout_matched_desc_weight                |
    | CLOSE, EOS     | 1               | 1  | 1                                          |

    (The scale self_context_struct_ce_weight of A2 is on the whole atom: inside a weighted mean it would
    cancel.) The text gate acts on rows with a positive weight except EOS and, in channel A, DESC.
    """

    def __init__(self, config: TokenCE):
        self.config = config
        self._tables: dict[tuple[ForwardKind, torch.device], Tensor] = {}

    def role_weight(self, forward: ForwardKind, role: TextRole) -> float:
        """w_t of a role, before the drop-invalid multiplier."""
        if role in (TextRole.STRUCT, TextRole.CLOSE, TextRole.EOS):
            return 1.0
        if role in (TextRole.MATCHED_STRUCT, TextRole.MATCHED_DESC):
            of_names = role is TextRole.MATCHED_DESC
            weight = (
                self.config.rollout_matched_desc_weight
                if of_names
                else self.config.rollout_matched_prefix_struct_weight
            )
            return weight if forward is ForwardKind.ROLLOUT else 0.0
        if forward is ForwardKind.ROLLOUT:
            return self.config.rollout_fn_desc_weight
        return 0.0 if forward is ForwardKind.SELF_CONTEXT else self.config.desc_ce_weight

    def __call__(self, rows: SupervisedRows, forward: ForwardKind) -> TextWeights:
        """Weights of the text rows, on their device. ContractError for rows without roles."""
        if rows.roles_R is None or rows.dropped_invalid_R is None:
            raise ContractError("stage-2 rows need a role each; build them with SupervisedRows.from_slots")
        roles_R = rows.roles_R
        ce_R = self._table(forward, roles_R.device)[roles_R]
        if forward is ForwardKind.ROLLOUT:
            boosted_R = rows.dropped_invalid_R & (roles_R == TextRole.STRUCT)
            multiplier = self.config.rollout_drop_invalid_struct_ce_multiplier
            ce_R = torch.where(boosted_R, ce_R * multiplier, ce_R)
        is_desc_R = roles_R == TextRole.DESC
        gated_R = (ce_R > 0) & (roles_R != TextRole.EOS)
        gated_R = gated_R & ~is_desc_R if forward.channel == "A" else gated_R
        return TextWeights(ce_R, is_desc_R, roles_R == TextRole.MATCHED_DESC, gated_R)

    def _table(self, forward: ForwardKind, device: torch.device) -> Tensor:
        """w_t by role, float32 [number of roles], copied to each device once."""
        if (forward, device) not in self._tables:
            weights = [self.role_weight(forward, role) for role in TextRole]
            self._tables[forward, device] = torch.tensor(weights, device=device)
        return self._tables[forward, device]
