"""`optimizer` of a run: names that exist, and settings that go with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.checks.problems import KeyPath, one_of
from coordexp.config.run.run_config import is_our_plugin
from coordexp.config.schema.optimizer import COORD_ADAMW, COORD_MUON
from coordexp.config.schema.sections import Sections

OURS = (COORD_ADAMW, COORD_MUON)
SWIFT_OPTIMIZERS = ("default", "galore", "lorap", "multimodal", "muonclip")
"""Names that ms-swift registers for `optimizer`, without its `muon`, which is refused."""
_EXPECTED = (*OURS, *SWIFT_OPTIMIZERS)
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def optimizer_problems(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(ms-swift argument, what is wrong with it)."""
    name = swift.get("optimizer")
    if name in OURS:
        yield from _with_ours(str(name), swift)
        return
    if name is None:
        return
    if name == "muon":
        yield (
            "optimizer",
            "ms-swift's muon clones its code from the network when training starts, and gives Muon all weights of two "
            "and more dimensions but embedding and head: fused qkv in one piece, patch convolution and position table, "
            "which are no hidden matrices. Use coord_muon.",
        )
        return
    if name == "lorap" and swift.get("lorap_lr_ratio") is None:
        yield "optimizer", "has no effect without lorap_lr_ratio."
    if name not in SWIFT_OPTIMIZERS and not has_other_plugins(swift):
        yield (
            "optimizer",
            f"nobody registers an optimizer of that name; {one_of(name, _EXPECTED)}, or one that a file of "
            "external_plugins registers.",
        )


def options_without_effect(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys of `custom.optimizer` that the run's optimizer does not read."""
    options, name = sections.custom.optimizer, swift.get("optimizer")
    if "groups" in options.model_fields_set and name not in OURS:
        yield (
            ("custom", "optimizer", "groups"),
            f"has no effect without optimizer: {COORD_ADAMW} or {COORD_MUON}; set that, or remove it.",
        )
    if "muon" in options.model_fields_set and name != COORD_MUON:
        yield (
            ("custom", "optimizer", "muon"),
            f"has no effect without optimizer: {COORD_MUON}; set that, or remove it.",
        )


def _with_ours(name: str, swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    optim = swift.get("optim")
    if optim is not None and str(optim) not in _ADAMW:
        yield (
            "optim",
            f"has no effect with optimizer: {name}, whose AdamW is torch's; expected one of {', '.join(_ADAMW)}, or "
            "nothing.",
        )
    if swift.get("fsdp"):
        yield "fsdp", why_not_fsdp(name)
    settings = deepspeed_settings(swift.get("deepspeed"))
    reason = None if settings is None else why_not_deepspeed(name, settings)
    if reason is not None:
        yield "deepspeed", reason


def why_not_fsdp(name: str) -> str:
    """Why an optimizer of ours does not run under FSDP."""
    return (
        f"optimizer: {name} does not run under FSDP, which hands it pieces of flattened weights: "
        + ("Muon needs whole matrices, and " if name == COORD_MUON else "")
        + "what decays is known by shape. Use DDP, or deepspeed: zero2."
    )


def why_not_deepspeed(name: str, settings: Mapping[str, Any]) -> str | None:
    """Why an optimizer of ours does not run with a DeepSpeed configuration, or None."""
    if "optimizer" in settings:
        return (
            f"the DeepSpeed configuration has an `optimizer`, which takes the place of optimizer: {name}; remove that "
            "entry."
        )
    zero = settings.get("zero_optimization") or {}
    if zero.get("stage") == 3:
        return (
            f"optimizer: {name} does not run under ZeRO-3, which keeps a slice of every weight on each rank and steps "
            "on those: "
            + ("Muon needs whole matrices, and " if name == COORD_MUON else "")
            + "what decays is known by shape. Use zero2."
        )
    if name == COORD_ADAMW:
        return None
    if zero.get("stage") not in (1, 2):
        return (
            f"optimizer: {name} does not run with stage {zero.get('stage', 0)}, where DeepSpeed puts copies of the "
            "weights in place of its matrices. Use zero2, or no DeepSpeed."
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        return (
            f"optimizer: {name} does not run with offload_optimizer: Muon multiplies matrices, and its shares would "
            "have to meet on the host. Use zero2."
        )
    return None


def deepspeed_settings(value: Any) -> Mapping[str, Any] | None:
    """What is known of a DeepSpeed configuration before a run: of ms-swift's names stage and offload, of a file all."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str):
        return None
    path = Path(value).expanduser()
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None  # DeepSpeed says what is wrong with the file
        return content if isinstance(content, dict) else None
    stage, _, offload = value.removeprefix("zero").partition("_")
    if not value.startswith("zero") or not stage.isdigit():
        return None
    zero: dict[str, Any] = {"stage": int(stage)}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def has_other_plugins(swift: Mapping[str, Any]) -> bool:
    plugins = swift.get("external_plugins") or []
    paths = plugins if isinstance(plugins, list) else [plugins]
    return any(not is_our_plugin(path) for path in paths)
