"""`custom.augmentation`: operations on pictures and their boxes, each with a probability, in phases over the run."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from coordexp.config.schema.section import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Factors = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
"""Least and most; drawn evenly between them."""
Degrees = Annotated[list[Annotated[float, Field(ge=-180, le=180)]], Field(min_length=2, max_length=2)]
_SAME: list[float] = [1.0, 1.0]


class Params(Section):
    """Of one operation."""

    prob: Probability = Field(default=1.0, description="How often the operation is made.")

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Params:
        for name, value in self:
            if isinstance(value, list) and value[0] > value[-1]:
                raise ValueError(f"{name} is {value}, expected [least, most]")
        return self


class HFlip(Section):
    """The picture and its boxes mirrored, left for right. (Descriptions that say "left" stay as they are.)"""

    name: Literal["hflip"]
    params: Params = Params()


class VFlip(Section):
    """The picture and its boxes mirrored, top for bottom."""

    name: Literal["vflip"]
    params: Params = Params()


class RandomCropParams(Params):
    """A window of the picture; objects that it cuts away are left out."""

    scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.5, 1.0], description="Share of the picture's area."
    )
    aspect_ratio: Factors = Field(
        default=[0.75, 4 / 3], description="Of the window, as a factor on the picture's."
    )
    min_coverage: Probability | None = Field(
        default=None,
        description="Objects of which less is left are left out; null: custom.augmentation.min_visible.",
    )
    min_objects: int = Field(
        default=1,
        ge=0,
        description="A window with fewer objects (or fewer than the picture has) is not taken; after 10 draws the "
        "picture stays whole.",
    )
    keep_size: bool = Field(default=False, description="Scale the window to the size of the picture.")


class RandomCrop(Section):
    """A window of the picture."""

    name: Literal["random_crop"]
    params: RandomCropParams = RandomCropParams()


class ResizeByScaleParams(Params):
    """Both sides times one factor."""

    lo: float = Field(default=0.8, gt=0, le=4, description="Least factor.")
    hi: float = Field(default=1.25, gt=0, le=4, description="Most.")
    align_multiple: int | None = Field(
        default=None, gt=0, description="Round both sides to multiples of this many pixels."
    )

    @model_validator(mode="after")
    def _lo_below_hi(self) -> ResizeByScaleParams:
        if self.lo > self.hi:
            raise ValueError(f"lo is {self.lo:g} and hi {self.hi:g}; expected lo <= hi")
        return self


class ResizeByScale(Section):
    """The picture made smaller or larger."""

    name: Literal["resize_by_scale"]
    params: ResizeByScaleParams = ResizeByScaleParams()


class ColorJitterParams(Params):
    """Factors; 1 leaves the picture as it is."""

    brightness: Factors = Field(default=_SAME, description="On all values.")
    contrast: Factors = Field(default=_SAME, description="On the distance from the mean gray.")
    saturation: Factors = Field(default=_SAME, description="On the distance from the pixel's gray.")


class ColorJitter(Section):
    """Brightness, then contrast, then saturation."""

    name: Literal["color_jitter"]
    params: ColorJitterParams


class HsvParams(Params):
    """Hue in degrees; saturation and value as factors."""

    hue_delta_deg: Degrees = Field(default=[0.0, 0.0], description="Turn of the hue.")
    sat: Factors = Field(default=_SAME, description="Factor on the saturation.")
    val: Factors = Field(default=_SAME, description="Factor on the value.")


class Hsv(Section):
    """Hue, saturation and value."""

    name: Literal["hsv"]
    params: HsvParams


class GammaParams(Params):
    """Exponent of the values in 0..1."""

    gamma: Factors = Field(description="Below 1 is lighter, above 1 darker.")


class Gamma(Section):
    """A gamma curve."""

    name: Literal["gamma"]
    params: GammaParams


class SharpnessParams(Params):
    """Factor; 0 would blur, 1 leaves the picture as it is."""

    factor: Factors = Field(description="On the distance from the smoothed picture.")


class Sharpness(Section):
    """Sharper or softer."""

    name: Literal["sharpness"]
    params: SharpnessParams


class BlurParams(Params):
    """Width of the Gaussian."""

    sigma: Factors = Field(description="In pixels.")


class Blur(Section):
    """Gaussian blur."""

    name: Literal["blur"]
    params: BlurParams


class AutoContrastParams(Params):
    """Nothing else can be set."""

    cutoff: Literal[0] = Field(default=0, description="Accepted as 0 alone: the full range is used.")


class AutoContrast(Section):
    """Every channel stretched to the full range."""

    name: Literal["auto_contrast"]
    params: AutoContrastParams = AutoContrastParams()


class Grayscale(Section):
    """No colours."""

    name: Literal["grayscale"]
    params: Params = Params(prob=0.1)


Operation = Annotated[
    HFlip
    | VFlip
    | RandomCrop
    | ResizeByScale
    | ColorJitter
    | Hsv
    | Gamma
    | Sharpness
    | Blur
    | AutoContrast
    | Grayscale,
    Field(discriminator="name"),
]
OPERATIONS: dict[str, tuple[str, ...]] = {
    typing.get_args(model.model_fields["name"].annotation)[0]: tuple(
        model.model_fields["params"].annotation.model_fields
    )
    for model in typing.get_args(typing.get_args(Operation)[0])
}
"""Name of each operation -> names of its parameters."""


class Phase(Section):
    """A stretch of the run with settings of its own."""

    until_percent: float = Field(
        gt=0, le=100, description="Where it ends; it begins where the one before ends."
    )
    bypass_prob: Probability | None = Field(
        default=None, description="Instead of custom.augmentation.bypass_prob."
    )
    ops: dict[str, dict[str, Any]] = Field(
        default={}, description="Parameters that differ, by the name of the operation: {hflip: {prob: 0.1}}."
    )


class Curriculum(Section):
    """Phases, in order."""

    phases: list[Phase] = Field(min_length=1, description="The last one ends at 100.")

    @model_validator(mode="after")
    def _ascend_to_the_end(self) -> Curriculum:
        ends = [phase.until_percent for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 100:
            shown = ", ".join(f"{end:g}" for end in ends)
            raise ValueError(f"phases end at {shown} percent; expected ascending ends, the last one 100")
        return self


class Augmentation(Section):
    """Changes of training pictures, with their boxes; the same in stage 1 and in rollouts and targets of stage 2."""

    enabled: bool = Field(
        default=False, description="Change training pictures; those of evaluation never are."
    )
    ops: list[Operation] = Field(
        default=[], description="Made one after another: `{name: hflip, params: {prob: 0.5}}`."
    )
    bypass_prob: Probability = Field(default=0.0, description="How often a picture is left as it is.")
    min_visible: Probability = Field(
        default=0.3,
        description="Objects of whose area less than this share is left in the picture are left out.",
    )
    curriculum: Curriculum | None = Field(
        default=None, description="Phases over the run, by the share of its optimizer steps."
    )

    @model_validator(mode="after")
    def _says_what_to_do(self) -> Augmentation:
        if self.enabled and not self.ops:
            raise ValueError("enabled: true, but ops is empty; list operations, or set enabled: false")
        for phase in _phases(self):
            self.in_phase(phase)
        return self

    def in_phase(self, phase: Phase | None) -> Augmentation:
        """These settings with what a phase changes, and no phases.

        Raises ValueError for an operation that is not in `ops`, or parameters that it does not take.
        """
        if phase is None:
            return self.model_copy(update={"curriculum": None})
        listed = {operation.name for operation in self.ops}
        for name in phase.ops:
            if name not in listed:
                raise ValueError(
                    f"a phase until {phase.until_percent:g} percent changes {name}, which is not in ops; listed there: "
                    f"{', '.join(sorted(listed)) or 'nothing'}"
                )
        changes: dict[str, Any] = {
            "ops": [_with_params(operation, phase.ops.get(operation.name, {})) for operation in self.ops],
            "curriculum": None,
        }
        if phase.bypass_prob is not None:
            changes["bypass_prob"] = phase.bypass_prob
        return self.model_copy(update=changes)

    @property
    def largest_scale(self) -> float:
        """By how much sides of a picture may grow at most."""
        grown = 1.0
        for settings in (self, *(self.in_phase(phase) for phase in _phases(self))):
            factors = [
                op.params.hi for op in settings.ops if isinstance(op, ResizeByScale) and op.params.prob
            ]
            grown = max(grown, math.prod(factors))
        return grown


def _phases(settings: Augmentation) -> list[Phase]:
    return settings.curriculum.phases if settings.curriculum else []


def _with_params(operation: Any, params: Mapping[str, Any]) -> Any:
    """The operation with some parameters replaced, checked as if they had been written there."""
    if not params:
        return operation
    written = operation.params.model_dump(exclude_unset=True)
    try:
        return operation.__class__(name=operation.name, params={**written, **params})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise ValueError(f"{operation.name} in a phase: {where or 'params'}: {first['msg']}") from None
