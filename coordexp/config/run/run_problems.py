"""All that can be wrong with a run beyond the type of each value, for the launcher and for the plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coordexp.config.checks.problems import PlaceOf, Problem, WrittenOf
from coordexp.config.run.effects import effect_problems
from coordexp.config.run.packing import packing_problems
from coordexp.config.run.values import value_problems
from coordexp.config.schema.custom import RLHF
from coordexp.config.schema.sections import Sections

RunCheck = Callable[[str, Sections, Mapping[str, Any], WrittenOf], list[Problem]]
"""(variant, our sections, ms-swift's arguments, how and where one was written) -> what is wrong."""


def run_problems(
    variant: str, sections: Sections, swift: Mapping[str, Any], written: WrittenOf, place: PlaceOf
) -> list[Problem]:
    """Values that cannot be meant, and settings that would have no effect.

    swift: ms-swift's arguments as converted, flat; those left out count as unset.
    """
    return [
        *value_problems(swift, written),
        *effect_problems(variant, sections, swift, written, place),
        *([] if variant == RLHF else packing_problems(swift, sections.training, variant, written, place)),
    ]
