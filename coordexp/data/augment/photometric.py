"""Operations on the values of a picture; shapes stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from coordexp.data.augment.draws import Draws

Change = Callable[[Tensor, Any, Draws], Tensor]
"""(uint8 picture [3, H, W], parameters of the operation, draws) -> a picture like it."""


def color_jitter(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.adjust_brightness(picture, draws.between(*params.brightness))
    picture = transforms.adjust_contrast(picture, draws.between(*params.contrast))
    picture = transforms.adjust_saturation(picture, draws.between(*params.saturation))
    return picture


def hsv(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.adjust_hue(picture, draws.between(*params.hue_delta_deg) / 360)
    picture = transforms.adjust_saturation(picture, draws.between(*params.sat))
    picture = transforms.adjust_brightness(picture, draws.between(*params.val))
    return picture


def gamma(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.adjust_gamma(picture, draws.between(*params.gamma))
    return picture


def sharpness(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.adjust_sharpness(picture, draws.between(*params.factor))
    return picture


def blur(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    sigma = draws.between(*params.sigma)
    reach = min(max(1, round(3 * sigma)), (min(picture.shape[-2:]) - 1) // 2)
    if reach:
        picture = transforms.gaussian_blur(picture, [2 * reach + 1] * 2, [sigma, sigma])
    return picture


def auto_contrast(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.autocontrast(picture)
    return picture


def grayscale(picture: Tensor, params: Any, draws: Draws) -> Tensor:
    picture = transforms.rgb_to_grayscale(picture, num_output_channels=3)
    return picture


CHANGES: dict[str, Change] = {
    "color_jitter": color_jitter,
    "hsv": hsv,
    "gamma": gamma,
    "sharpness": sharpness,
    "blur": blur,
    "auto_contrast": auto_contrast,
    "grayscale": grayscale,
}
"""By the name of the operation."""
