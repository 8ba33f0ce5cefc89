"""Parameter groups: every trained parameter goes to the first rule whose pattern its name matches.

Pure: (name, parameter) pairs and rules in, groups out. Tables for people are made of groups too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from coordexp.errors import ConfigError

Algorithm = Literal["adamw", "muon"]
Named = Sequence[tuple[str, nn.Parameter]]
"""Names and parameters of a model; a matrix that two modules share stands under both of its names."""

FUSED = ("qkv", "query_key_value", "c_attn", "gate_up_proj", "in_proj")
"""Parts of names of projections that hold several matrices, one above the other."""
REST = "*"
"""The pattern of what no other rule takes."""


@dataclass(frozen=True)
class GroupRule:
    """How parameters whose names match a shell pattern are trained.

    setting: where the pattern was written, for errors.  lr_scale, weight_decay_mult: factors on those of the run.
    """

    pattern: str
    setting: str
    algorithm: Algorithm = "adamw"
    lr_scale: float = 1.0
    weight_decay_mult: float = 1.0


@dataclass(frozen=True)
class Part:
    """A part of the model with a learning rate of its own: parameters whose names begin with a prefix."""

    name: str
    prefixes: tuple[str, ...]
    learning_rate: float

    def has(self, name: str) -> bool:
        """Does a parameter belong to it?"""
        return name.startswith(self.prefixes)


@dataclass
class ParameterGroup:
    """Parameters that are trained alike, with their names."""

    name: str
    algorithm: Algorithm
    learning_rate: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


def parameter_groups(
    named: Named, rules: Sequence[GroupRule], parts: Sequence[Part], *, weight_decay: float
) -> list[ParameterGroup]:
    """Groups of the trained parameters, by rule, part and decay; those of the last rule come first.

    The first rule that matches takes a parameter, the first part that has it gives its learning rate. Only parameters
    of two and more dimensions decay.

    Args:
        named: with both names of a shared matrix (`named_parameters(remove_duplicate=False)`).
        rules: in order; the last one is usually `*`.
        parts: in order; the last one has everything (prefix "").
        weight_decay: of the run.

    Raises:
        ConfigError: a pattern that takes no trained parameter, or a trained parameter that no rule or part takes.
    """
    groups: dict[tuple[int, str, bool], ParameterGroup] = {}
    for name, parameter in _trained(named):
        number = next((i for i, rule in enumerate(rules) if fnmatchcase(name, rule.pattern)), None)
        part = next((part for part in parts if part.has(name)), None)
        if number is None or part is None:
            raise ConfigError(
                f"{name} is trained, and no group of custom.optimizer takes it; add a pattern for it."
            )
        rule, decays = rules[number], parameter.ndim >= 2
        group = groups.setdefault(
            (number, part.name, decays),
            ParameterGroup(
                _label(rule, part, decays),
                rule.algorithm,
                part.learning_rate * rule.lr_scale,
                weight_decay * rule.weight_decay_mult if decays else 0.0,
            ),
        )
        group.names.append(name)
        group.parameters.append(parameter)
    _refuse_empty(named, rules, {number for number, _, _ in groups})
    order = {part.name: position for position, part in enumerate(reversed(parts))}
    last = len(rules) - 1
    keys = sorted(groups, key=lambda key: (key[0] != last, key[0], order[key[1]], not key[2]))
    return [groups[key] for key in keys]


def _trained(named: Named) -> Named:
    """Each trained parameter once, under its first name."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            first.setdefault(id(parameter), (name, parameter))
    return list(first.values())


def _label(rule: GroupRule, part: Part, decays: bool) -> str:
    where = f"{part.name}: " if part.name else ""
    what = "everything else" if rule.pattern == REST else rule.pattern
    return f"{where}{what}{'' if decays else ' (vectors)'}"


def _refuse_empty(named: Named, rules: Sequence[GroupRule], used: set[int]) -> None:
    lora = any(".lora_" in name for name, _ in named)
    for number, rule in enumerate(rules):
        if number in used or rule.pattern == REST:
            continue
        matched = [(name, p) for name, p in named if fnmatchcase(name, rule.pattern)]
        if not matched:
            names = [name for name, p in named if p.requires_grad][:3]
            raise ConfigError(
                f"{rule.setting}: {rule.pattern!r} matches no parameter of the model; the names of trained ones look "
                f"like {', '.join(names) or '(none is trained)'}."
                + (" Under LoRA these are *.lora_A.* and *.lora_B.*." if lora else "")
            )
        if not any(p.requires_grad for _, p in matched):
            raise ConfigError(
                f"{rule.setting}: all that {rule.pattern!r} matches is frozen ({matched[0][0]}); "
                + (
                    "under LoRA the projections are, and what is trained are the matrices *.lora_A.* and *.lora_B.*: "
                    "name these, or use optimizer: coord_adamw."
                    if lora
                    else "train it, or remove the pattern."
                )
            )
        raise ConfigError(
            f"{rule.setting}: every parameter that {rule.pattern!r} matches ({matched[0][0]}) is taken by an earlier "
            "pattern; remove one of the two."
        )


def pieces_of(
    groups: Iterable[ParameterGroup], named: Named, ends: Mapping[int, str], split: Mapping[str, int]
) -> dict[nn.Parameter, int]:
    """Parameters that Muon shall take in several matrices, one above the other -> how many.

    Args:
        groups: of `parameter_groups`.
        named: as there.
        ends: id of a parameter that is no hidden matrix -> what it is ("an embedding").
        split: shell pattern -> number of matrices.

    Raises:
        ConfigError: Muon was given something that is no hidden matrix, or a fused projection in one piece; rows that
            do not divide; a pattern of `split` that matches no matrix of Muon.
    """
    shared = {key for key, count in Counter(id(p) for _, p in named).items() if count > 1}
    pieces: dict[nn.Parameter, int] = {}
    idle = set(split)
    for group in groups:
        if group.algorithm != "muon":
            continue
        for name, parameter in zip(group.names, group.parameters, strict=True):
            kind = ends.get(id(parameter), "shared by two modules" if id(parameter) in shared else None)
            if kind is None and parameter.ndim != 2:
                kind = f"of {parameter.ndim} dimensions"
            if kind is not None:
                raise ConfigError(
                    f"custom.optimizer.muon.matrices: {name} is {kind}; Muon is for two-dimensional matrices between "
                    "hidden states. Narrow the pattern, so that AdamW takes it."
                )
            pattern = next((pattern for pattern in split if fnmatchcase(name, pattern)), None)
            if pattern is not None:
                idle.discard(pattern)
                if parameter.shape[0] % split[pattern]:
                    raise ConfigError(
                        f"custom.optimizer.muon.split: {name} has {parameter.shape[0]} rows, which do not divide into "
                        f"{split[pattern]} matrices."
                    )
                pieces[parameter] = split[pattern]
            elif any(word in name for word in FUSED):
                raise ConfigError(
                    f"custom.optimizer.muon.matrices: {name} holds several projections in one matrix, which Muon would "
                    "make orthogonal to each other; say how many in custom.optimizer.muon.split "
                    "({'*.qkv.weight': 3}), or leave it to AdamW."
                )
    if idle:
        raise ConfigError(
            f"custom.optimizer.muon.split: {min(idle)!r} matches no matrix that Muon trains; remove it."
        )
    return pieces


def table_of(param_groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each group of an optimizer: its pattern, optimizer, sizes, learning rate and decay.

    Groups that an adapter added are those without a name.
    """
    rows = []
    for group in param_groups:
        parameters: list[Tensor] = group["params"]
        rows.append(
            {
                "group": group.get("name", "custom.coord_offset"),
                "optimizer": group.get("algorithm", "adamw"),
                "tensors": len(parameters),
                "parameters": sum(parameter.numel() for parameter in parameters),
                "learning_rate": group.get("initial_lr", group["lr"]),
                "weight_decay": group["weight_decay"],
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text."""
    cells = [
        ("group", "optimizer", "tensors", "parameters", "learning rate", "weight decay"),
        *(
            (
                str(row["group"]),
                str(row["optimizer"]),
                f"{row['tensors']:,}",
                f"{row['parameters']:,}",
                f"{row['learning_rate']:g}",
                f"{row['weight_decay']:g}",
            )
            for row in rows
        ),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def refuse_unclaimed(named: Named, param_groups: Iterable[Mapping[str, Any]]) -> None:
    """ConfigError for a trained parameter that no group of an optimizer holds, or that two hold."""
    held = Counter(id(parameter) for group in param_groups for parameter in group["params"])
    for name, parameter in _trained(named):
        if held[id(parameter)] != 1:
            raise ConfigError(
                f"{name} is trained and stands in {held[id(parameter)]} groups of the optimizer; expected one."
            )
