"""`optimizer: coord_adamw` and `coord_muon` in a run: from settings and model to an optimizer, and its table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from coordexp.config.run.optimizers import why_not_deepspeed, why_not_fsdp
from coordexp.config.schema.optimizer import COORD_ADAMW, COORD_MUON, OptimizerOptions
from coordexp.errors import ConfigError
from coordexp.models.coord_offset import TABLE
from coordexp.optim.composed import MuonAdamW, param_groups_of
from coordexp.optim.groups import (
    REST,
    GroupRule,
    Named,
    Part,
    format_table,
    parameter_groups,
    pieces_of,
    refuse_unclaimed,
    table_of,
)
from coordexp.optim.zero import zero_layouts
from coordexp.swift_bridge.registry.optimizers import register_optimizer, vision_prefixes
from coordexp.trainers.runtime import active

logger = logging.getLogger(__name__)

OURS = (COORD_ADAMW, COORD_MUON)


def register_optimizers() -> None:
    """Make both names known to ms-swift."""
    for name in OURS:
        register_optimizer(name, _create)


def _create(trainer: Any, model: nn.Module) -> Optimizer:
    args = trainer.args
    _refuse_sharded_weights(args.optimizer, trainer.deepspeed_config, is_fsdp=trainer.is_fsdp_enabled)
    options = active().sections.custom.optimizer
    named = list(model.named_parameters(remove_duplicate=False))
    groups = parameter_groups(
        named,
        rules_of(options, with_muon=args.optimizer == COORD_MUON),
        _parts(model, args),
        weight_decay=args.weight_decay,
    )
    adamw = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "fused": args.optim == "adamw_torch_fused" or None,
    }
    if args.optimizer == COORD_ADAMW:
        return AdamW(param_groups_of(groups), **adamw)
    muon = options.muon
    return MuonAdamW(
        groups,
        muon={
            "momentum": muon.momentum,
            "nesterov": muon.nesterov,
            "ns_steps": muon.ns_steps,
            "adjust_lr_fn": muon.adjust_lr_fn,
        },
        adamw=adamw,
        pieces=pieces_of(groups, named, no_hidden_matrices(model, named), muon.split),
    )


def rules_of(options: OptimizerOptions, *, with_muon: bool) -> list[GroupRule]:
    """The patterns of the settings in the order in which they take parameters; the last takes everything else."""
    here = "custom.optimizer"
    rules = [
        GroupRule(pattern, f"{here}.groups[{i}].patterns", "adamw", group.lr_scale, group.weight_decay_mult)
        for i, group in enumerate(options.groups)
        for pattern in group.patterns
    ]
    if with_muon:
        muon = options.muon
        rules += [
            GroupRule(pattern, f"{here}.muon.matrices", "muon", muon.lr_scale, muon.weight_decay_mult)
            for pattern in muon.matrices
        ]
    return [*rules, GroupRule(REST, here)]


def no_hidden_matrices(model: nn.Module, named: Named) -> dict[int, str]:
    """id of a parameter between tokens or positions and hidden states -> what it is."""
    ends = {
        id(module.weight): "an embedding" for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for name, parameter in named:
        if "lm_head" in name:
            ends.setdefault(id(parameter), "an output head")
        elif TABLE in name:
            ends[id(parameter)] = "a table of custom.coord_offset"
    return ends


def _parts(model: nn.Module, args: Any) -> list[Part]:
    """Vision tower and aligner where they have a learning rate of their own, and the rest."""
    parts = []
    if args.vit_lr is not None or args.aligner_lr is not None:
        tower, aligner = vision_prefixes(model)
        rates = {"aligner": (aligner, args.aligner_lr), "vision tower": (tower, args.vit_lr)}
        parts = [
            Part(name, prefixes, args.learning_rate if rate is None else rate)
            for name, (prefixes, rate) in rates.items()
            if prefixes
        ]
    return [*parts, Part("", ("",), args.learning_rate)]


def _refuse_sharded_weights(name: str, deepspeed: Mapping[str, Any] | None, *, is_fsdp: bool) -> None:
    reason = why_not_fsdp(name) if is_fsdp else None
    if deepspeed is not None:
        reason = why_not_deepspeed(name, deepspeed)
    if reason is not None:
        raise ConfigError(reason)


def checked_table(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The table of a fresh optimizer of ours, logged.

    Raises:
        ConfigError: a trained parameter in no group, or in two.
    """
    refuse_unclaimed(list(model.named_parameters()), optimizer.param_groups)
    rows = table_of(optimizer.param_groups)
    logger.info("parameter groups of the optimizer:\n%s", format_table(rows))
    return rows


def meet_flat_weights(optimizer: Optimizer, zero: Any) -> None:
    """Tell Muon how ZeRO 1 or 2 has cut its matrices.

    Args:
        optimizer: as it was created.
        zero: the optimizer that DeepSpeed has put around it.
    """
    if isinstance(optimizer, MuonAdamW):
        if zero.optimizer is not optimizer:
            raise ConfigError(
                f"optimizer: {COORD_MUON}: DeepSpeed trains with {type(zero.optimizer).__name__} in its place."
            )
        optimizer.use_layouts(zero_layouts(zero, optimizer.pieces))
