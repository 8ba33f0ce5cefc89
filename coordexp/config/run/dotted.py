"""Our settings as flags of their own, `--stage2_ab.schedule.b_ratio 0.5`: for the launcher and plain `swift sft`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordexp.config.checks.problems import COMMAND_LINE, KeyPath, Place
from coordexp.config.checks.yaml_tree import Tree, parse_scalar, read_yaml
from coordexp.config.schema.sections import Sections, sections_from_tree
from coordexp.errors import ConfigError


@dataclass(frozen=True)
class DottedFlag:
    """`--rollout_matching.max_new_tokens 256`. values: its words, none for a flag that stands alone."""

    name: str
    values: tuple[str, ...]

    @property
    def path(self) -> KeyPath:
        """("rollout_matching", "max_new_tokens")."""
        return parse_path(self.name, f"--{self.name}")

    @property
    def value(self) -> Any:
        """The words as YAML: one value, a list of several, true for none."""
        parsed = [parse_scalar(text) for text in self.values]
        return True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def split_dotted(argv: Sequence[str]) -> tuple[list[DottedFlag], list[str]]:
    """The flags whose first part is a section of ours, in order, and all other words."""
    dotted: list[DottedFlag] = []
    rest: list[str] = []
    taking = False
    for word in argv:
        if not word.startswith("--"):
            if taking:
                dotted[-1] = DottedFlag(dotted[-1].name, (*dotted[-1].values, word))
            else:
                rest.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        section, dot, _ = name.partition(".")
        taking = bool(dot) and section in Sections.model_fields
        if taking:
            dotted.append(DottedFlag(name, (value,) if equals else ()))
            taking = not equals
        else:
            rest.append(word)
    return dotted, rest


def sections_of_flags(
    sections: Mapping[str, Any] | None, config_file: str | None, dotted: Sequence[DottedFlag] = ()
) -> Sections:
    """The settings of `--coordexp` or `--coordexp_config`, with dotted flags laid over them.

    Raises:
        ConfigError: both are given, or every problem of the settings.
    """
    if sections is not None and config_file is not None:
        raise ConfigError("--coordexp and --coordexp_config are both given; put the settings in one place.")
    if config_file is not None:
        tree = read_yaml(config_file)
    else:
        tree = Tree(copy.deepcopy(dict(sections or {})), {(): Place("--coordexp")})
    for flag in dotted:
        tree.set(flag.path, flag.value, COMMAND_LINE)
    return sections_from_tree(tree)


def parse_path(name: str, shown: str) -> KeyPath:
    """`a.b[0].c` -> ("a", "b", 0, "c"). shown: what an error calls it."""
    if not re.fullmatch(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", name):
        raise ConfigError(f"{shown}: expected a dotted path, such as custom.coord_soft_ce_w1.enabled.")
    parts = re.findall(r"\w+", name)
    return tuple(int(part) if part.isdigit() else part for part in parts)
