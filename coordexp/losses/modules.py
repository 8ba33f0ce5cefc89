"""The stage-2 module lists: typed, frozen settings read strictly from plain mappings.

A run declares an ordered list of objective modules (`token_ce`, `bbox_geo`, `coord_reg`) and of
diagnostics (`coord_diag`). Every entry has exactly the keys name, enabled, weight, channels and config, and
`config` has exactly the keys of its module:

    - {name: bbox_geo, enabled: true, weight: 1.0, channels: [A, B],
       config: {smoothl1_weight: 1.0, ciou_weight: 1.0}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordexp.errors import ConfigError
from coordexp.losses.settings import check_bool, check_keys, check_numbers, dotted, number, read, unknown_name

CHANNELS = ("A", "B")


@dataclass(frozen=True)
class TokenCE:
    """`token_ce`: cross-entropy of text tokens, weighted by what the token is."""

    desc_ce_weight: float = number(minimum=0)
    """Descriptions of ground truth (channel A)."""
    self_context_struct_ce_weight: float = number(minimum=0)
    """Scale of the structure cross-entropy of the last self-context forward (channel A, atom A2_text)."""
    rollout_fn_desc_weight: float = number(minimum=0)
    """Descriptions of appended missed objects (channel B)."""
    rollout_matched_prefix_struct_weight: float = number(minimum=0)
    """Structure of matched predictions in the prefix (channel B)."""
    rollout_drop_invalid_struct_ce_multiplier: float = number(minimum=1, maximum=4)
    """Factor on the structure of appended objects, in samples that dropped an invalid prediction (B)."""


@dataclass(frozen=True)
class BboxGeo:
    """`bbox_geo`: losses on boxes decoded from the coordinate distributions."""

    smoothl1_weight: float = number(minimum=0)
    ciou_weight: float = number(minimum=0)


@dataclass(frozen=True)
class CoordReg:
    """`coord_reg`: losses on the coordinate distributions, and the text gate."""

    coord_ce_weight: float = number(minimum=0)
    coord_el1_weight: float = number(minimum=0)
    coord_ehuber_weight: float = number(minimum=0)
    coord_huber_delta: float = number(above=0)
    """In units of the image side."""
    coord_entropy_weight: float = number(minimum=0)
    coord_gate_weight: float = number(minimum=0)
    text_gate_weight: float = number(minimum=0)
    soft_ce_weight: float = number(minimum=0)
    self_context_soft_ce_weight: float = number(minimum=0)
    """Added to soft_ce_weight in channel A."""
    w1_weight: float = number(minimum=0)
    temperature: float = number(above=0)
    """T of the coordinate distribution, for this module, box decoding and coord_diag alike."""
    target_sigma: float = number(above=0)
    target_truncate: float | None = number(minimum=0, optional=True)


@dataclass(frozen=True)
class CoordDiag:
    """`coord_diag`: monitors of the coordinate distributions; no settings."""


OBJECTIVE_MODULES: dict[str, type] = {"token_ce": TokenCE, "bbox_geo": BboxGeo, "coord_reg": CoordReg}
DIAGNOSTIC_MODULES: dict[str, type] = {"coord_diag": CoordDiag}


@dataclass(frozen=True)
class ModuleSpec:
    """One entry of a module list."""

    name: str
    enabled: bool
    channels: tuple[str, ...]
    config: TokenCE | BboxGeo | CoordReg | CoordDiag
    weight: float = number(minimum=0)

    def __post_init__(self) -> None:
        check_numbers(self)
        if type(self.config) is not (OBJECTIVE_MODULES | DIAGNOSTIC_MODULES).get(self.name):
            raise ConfigError(f"{self.name}: found config of type {type(self.config).__name__}")
        check_numbers(self.config, f"{self.name}.config")

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any], path: str, modules: Mapping[str, type]) -> ModuleSpec:
        """Raises ConfigError with the dotted path for anything missing, unknown or out of range."""
        check_keys(cls, entry, path, complete=True)
        name = entry["name"]
        if not isinstance(name, str) or name not in modules:
            raise ConfigError(unknown_name(dotted(path, "name"), str(name), modules))
        check_bool(dotted(path, "enabled"), entry["enabled"])
        channels = _channels(entry["channels"], dotted(path, "channels"))
        config: Any = read(modules[name], entry["config"], dotted(path, "config"), complete=True)
        return read(cls, {**entry, "channels": channels, "config": config}, path, complete=True)

    def weight_in(self, channel: str) -> float:
        """Weight of the module in a channel, 0 where it is off."""
        return self.weight if self.enabled and channel in self.channels else 0.0


@dataclass(frozen=True)
class ObjectiveSpec:
    """The objective and diagnostics lists of a run, in order. At most one entry per module."""

    objective: tuple[ModuleSpec, ...]
    diagnostics: tuple[ModuleSpec, ...] = ()

    @classmethod
    def from_mappings(
        cls,
        objective: Sequence[Mapping[str, Any]],
        diagnostics: Sequence[Mapping[str, Any]] = (),
        path: str = "pipeline",
    ) -> ObjectiveSpec:
        """Read both lists. `path` is the dotted path of the section that holds them, for messages.

        Raises ConfigError for a repeated module, for coord_reg before bbox_geo, for a text gate without
        supervised text, and for everything `ModuleSpec.from_mapping` refuses.
        """
        spec = cls(
            _entries(objective, dotted(path, "objective"), OBJECTIVE_MODULES),
            _entries(diagnostics, dotted(path, "diagnostics"), DIAGNOSTIC_MODULES),
        )
        spec._check_order(dotted(path, "objective"))
        spec._check_text_gate(dotted(path, "objective"))
        return spec

    def find(self, name: str) -> ModuleSpec | None:
        """The entry of a module, enabled or not; None if it is not listed."""
        return next((entry for entry in self.objective + self.diagnostics if entry.name == name), None)

    def _check_order(self, path: str) -> None:
        names = [entry.name for entry in self.objective]
        if {"bbox_geo", "coord_reg"} <= set(names) and names.index("coord_reg") < names.index("bbox_geo"):
            raise ConfigError(
                f"{path}[{names.index('coord_reg')}]: coord_reg stands before bbox_geo; list bbox_geo first"
            )

    def _check_text_gate(self, path: str) -> None:
        coord_reg, token_ce = self.find("coord_reg"), self.find("token_ce")
        if coord_reg is None or not isinstance(coord_reg.config, CoordReg):
            return
        for channel in CHANNELS:
            gated = coord_reg.weight_in(channel) * coord_reg.config.text_gate_weight > 0
            if gated and (token_ce is None or token_ce.weight_in(channel) == 0):
                raise ConfigError(
                    f"{path}[{self.objective.index(coord_reg)}].config.text_gate_weight = "
                    f"{coord_reg.config.text_gate_weight}: the text gate acts on rows that token_ce "
                    f"supervises, and it is off in channel {channel}; enable it there or set the weight to 0"
                )


def _entries(entries: Any, path: str, modules: Mapping[str, type]) -> tuple[ModuleSpec, ...]:
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence):
        raise ConfigError(f"{path}: found {type(entries).__name__} {entries!r}, expected a list of modules")
    specs = tuple(ModuleSpec.from_mapping(entry, f"{path}[{i}]", modules) for i, entry in enumerate(entries))
    names = [spec.name for spec in specs]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{path}[{i}].name = {name!r}: already listed at {path}[{names.index(name)}]")
    return specs


def _channels(value: Any, path: str) -> tuple[str, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not value or any(c not in CHANNELS for c in value) or len(set(value)) != len(value):
        raise ConfigError(f"{path} = {value!r}: expected a non-empty list out of A, B")
    return tuple(value)
