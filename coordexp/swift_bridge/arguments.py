"""What the plugin reads from the command line of `swift sft` or `swift rlhf`, and the rejection of flags nobody knows.

ms-swift imports plugins while it parses its arguments and offers them no way to add flags, so ours are read from
`sys.argv`. They need `--ignore_args_error true`, under which ms-swift only warns about a misspelt flag; this module
restores the error.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.arguments import RLHFArguments, SftArguments
from swift.utils.utils import _patch_get_type_hints
from transformers import HfArgumentParser

from coordexp.config import Sections
from coordexp.config.run.dotted import DottedFlag, split_dotted
from coordexp.errors import ConfigError

HUB_FLAGS = ("model_revision", "use_hf", "hub_token")
OUR_FLAGS = ("custom_trainer_variant", "coordexp", "coordexp_config")


@dataclass(frozen=True)
class PluginFlags:
    """Our own flags, and ms-swift's as it will parse them: the plugin runs before ms-swift has built its arguments."""

    variant: str | None
    sections: dict[str, Any] | None
    config_file: str | None
    swift: dict[str, Any]
    dotted: tuple[DottedFlag, ...] = ()
    """Settings of ours as flags of their own (`--custom.head plain`), laid over the other two."""
    given: frozenset[str] = frozenset()
    """Names of the flags that are written, whatever their values."""

    @property
    def model(self) -> str | None:
        model: str | None = self.swift["model"]
        return model

    @property
    def datasets(self) -> tuple[str, ...]:
        return (*self.swift["dataset"], *self.swift["val_dataset"])

    @property
    def strict(self) -> bool:
        """Whether a sample that cannot be encoded stops the run: yes, unless `--strict false` is written."""
        return bool(self.swift["strict"]) or "strict" not in self.given

    @property
    def data_seed(self) -> int:
        """Of the order of the samples: the run's seed, unless `--data_seed` is written."""
        return int(self.swift["data_seed" if "data_seed" in self.given else "seed"])


def read_plugin_flags(argv: Sequence[str], *, rlhf: bool = False) -> PluginFlags:
    """Split `argv` into our flags and those of `swift sft`, or of `swift rlhf`.

    Raises:
        ConfigError: a flag neither side knows (with the nearest valid one), or `--coordexp` that is not a JSON object.
    """
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in OUR_FLAGS:
        ours.add_argument(f"--{flag}")
    dotted, others = split_dotted(argv)
    own, rest = ours.parse_known_args(others)
    with _patch_get_type_hints():
        swift_parser = HfArgumentParser([RLHFArguments if rlhf else SftArguments])
    swift_parser.allow_abbrev = False
    reject_unknown_flags(rest, [o for action in swift_parser._actions for o in action.option_strings])
    swift_values, left_over = swift_parser.parse_known_args(rest)
    if left_over:
        raise ConfigError(
            f"{' '.join(left_over)}: not part of any flag; expected --flag value. Nothing was started."
        )
    return PluginFlags(
        variant=own.custom_trainer_variant,
        sections=_json_object(own.coordexp),
        config_file=own.coordexp_config,
        dotted=tuple(dotted),
        swift=vars(swift_values),
        given=frozenset(word[2:].split("=", 1)[0] for word in argv if word.startswith("--")),
    )


@dataclass(frozen=True)
class LoadFlags:
    """What any ms-swift command loads, and our own settings beside it.

    hub: `model_revision`, `use_hf` and `hub_token`.
    """

    model: str | None
    adapters: tuple[str, ...]
    hub: dict[str, Any]
    sections: dict[str, Any] | None
    config_file: str | None
    dotted: tuple[DottedFlag, ...] = ()


def read_load_flags(argv: Sequence[str]) -> LoadFlags:
    """The flags of a command other than `sft`; ConfigError for `--coordexp` that is not a JSON object."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("model", "model_revision", "hub_token", *OUR_FLAGS):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--use_hf", type=lambda text: text.lower() == "true")
    parser.add_argument("--adapters", nargs="*", default=[])
    dotted, others = split_dotted(argv)
    found = vars(parser.parse_known_args(others)[0])
    return LoadFlags(
        found["model"],
        tuple(found["adapters"]),
        {name: found[name] for name in HUB_FLAGS},
        _json_object(found["coordexp"]),
        found["coordexp_config"],
        tuple(dotted),
    )


def reject_unknown_flags(argv: Sequence[str], known: Sequence[str]) -> None:
    """ConfigError that names every flag of `argv` missing from `known`, each with the nearest valid one."""
    valid = [*known, *(f"--{flag}" for flag in OUR_FLAGS)]
    unknown = [token.split("=", 1)[0] for token in argv if token.startswith("--")]
    unknown = [flag for flag in unknown if flag not in known]
    if not unknown:
        return
    lines = []
    for flag in unknown:
        near = _nearest(flag, valid)
        lines.append(f"{flag}: " + (f"did you mean {near}?" if near else "no similar flag exists"))
    raise ConfigError(
        "flags that neither ms-swift nor coordexp knows: " + "; ".join(lines) + " Nothing was started. "
        "(`swift sft --help` lists ms-swift's flags, runbooks/config.md ours.)"
    )


def _nearest(flag: str, valid: Sequence[str]) -> str | None:
    section, dot, key = flag.removeprefix("--").partition(".")
    if dot:
        near = difflib.get_close_matches(section, list(Sections.model_fields), n=1)
        return f"--{near[0]}.{key}" if near else None
    near = difflib.get_close_matches(flag, valid, n=1)
    return near[0] if near else None


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--coordexp is not valid JSON ({error}); expected an object such as '{{\"custom\": {{}}}}'."
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"--coordexp holds a JSON {type(value).__name__}; expected an object of sections.")
    return value
