"""A picture gives the same pixels to training, to both engines, to a rollout server and to an OpenAI server."""

from __future__ import annotations

import base64
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import PICTURES, write_picture
from support.seen_pictures import Seen
from support.vllm import require_vllm

from coordexp.geometry import dequantize_boxes, quantize_boxes
from coordexp.pictures import open_picture, picture_facts
from coordexp.rollout.backends.openai_client import chat_messages
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, questions_template
from coordexp.swift_bridge.prompts import encode_prompt

XYXY = tuple[int, int, int, int]
MESSAGES = ({"role": "user", "content": "<image>Find all objects."},)


def by_training(policy: Any, path: Path) -> Seen:
    messages = [*MESSAGES, {"role": "assistant", "content": "{}"}]
    prompt = encode_prompt(policy.template, {"messages": messages, "images": [str(path)]})
    return Seen(prompt.pixel_values_PD, prompt.image_grid_thw_I3)


def by_transformers(policy: Any, image: str | bytes) -> Seen:
    encoded = encode_question(questions_template(policy.template, policy.model), MESSAGES, [image])
    return Seen(encoded["pixel_values"], encoded["image_grid_thw"])


def by_vllm(policy: Any, image: str | bytes) -> Seen:
    """What the template hands to vLLM, after vLLM's own turning of pictures, through the processor."""
    from vllm.multimodal.image import normalize_image

    questions = questions_template(policy.template, None)
    questions.set_mode("vllm")
    encoded = encode_question(questions, MESSAGES, [image])
    [picture] = encoded["images"]
    return processed(policy, normalize_image(picture), **encoded["mm_processor_kwargs"])


def by_openai(policy: Any, path: Path) -> Seen:
    """What `vllm serve` makes of what the client sends."""
    from vllm.multimodal.media import ImageMediaIO

    [message] = chat_messages(RolloutRequest(MESSAGES, (str(path),)), policy.template.pixel_limits)
    [uri] = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    loaded = ImageMediaIO().load_bytes(base64.b64decode(uri.partition(",")[2]))
    return processed(policy, loaded.media)


def processed(policy: Any, picture: Image.Image, **options: Any) -> Seen:
    made = policy.template.processor.image_processor(images=[picture], return_tensors="pt", **options)
    return Seen(made["pixel_values"], made["image_grid_thw"])


def every_way(policy: Any, path: Path) -> dict[str, Seen]:
    content = path.read_bytes()  # what a rollout server is given
    return {
        "training": by_training(policy, path),
        "transformers": by_transformers(policy, str(path)),
        "transformers, bytes": by_transformers(policy, content),
        "vllm": by_vllm(policy, str(path)),
        "vllm, bytes": by_vllm(policy, content),
        "openai": by_openai(policy, path),
    }


@pytest.mark.vllm
@pytest.mark.parametrize("name", PICTURES)
def test_every_way_of_a_picture_ends_in_the_same_tensor(policy, tmp_path: Path, name: str):
    require_vllm()
    path = write_picture(tmp_path, name)
    expected = processed(policy, open_picture(path), do_resize=False).fingerprint
    found = {name: seen.fingerprint for name, seen in every_way(policy, path).items()}
    assert found == dict.fromkeys(found, expected)


# (width, height) of the upright picture, what the file is like, EXIF orientation
PHOTOGRAPHS = [
    (480, 321, "RGB", 1), (321, 480, "RGB", 6), (333, 500, "RGB", 8), (97, 61, "L", 1), (500, 30, "RGB", 1),
    (31, 31, "RGBA", 1), (300, 200, "RGBA", 6), (257, 255, "CMYK", 3), (210, 145, "I;16", 5), (161, 320, "P", 7),
]  # fmt: skip
STORED_AS = {  # EXIF orientation -> how the upright picture is turned before it is stored
    1: None, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def write_photograph(folder: Path, width: int, height: int, mode: str, orientation: int) -> tuple[Path, XYXY]:
    """A bright scene with a dark mark somewhere, and the mark's place in pixels of the upright picture."""
    y, x = np.mgrid[:height, :width]
    bright = 215 + 20 * np.sin(x / 17) * np.cos(y / 13)
    left, top, right, bottom = width // 2, height // 5, width * 4 // 5, height // 2
    bright[top:bottom, left:right] = 0
    picture = Image.fromarray(bright.astype(np.uint8))
    if mode == "RGBA":
        alpha = np.zeros((height, width), np.uint8)
        alpha[top:bottom, left:right] = 255
        picture = picture.convert("RGB")
        picture.putalpha(Image.fromarray(alpha))
    elif mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    turn = STORED_AS[orientation]
    picture = picture if turn is None else picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / ("photograph.jpg" if mode in ("RGB", "L", "CMYK") else "photograph.png")
    picture.save(path, exif=exif)
    return path, (left, top, right - 1, bottom - 1)


@pytest.mark.vllm
@pytest.mark.parametrize(("width", "height", "mode", "orientation"), PHOTOGRAPHS)
def test_boxes_of_the_models_frame_lie_on_the_pixels_they_came_from(
    policy, tmp_path: Path, width: int, height: int, mode: str, orientation: int
):
    """The bins of a mark, read as places in what the model sees: dark inside, bright around, on every way."""
    require_vllm()
    path, mark = write_photograph(tmp_path, width, height, mode, orientation)
    facts = picture_facts(path)
    assert (facts.width, facts.height) == (width, height)
    seen = every_way(policy, path)
    assert len({one.fingerprint for one in seen.values()}) == 1
    brightness = seen["training"].brightness(policy.template.processor.image_processor)
    model_height, model_width = brightness.shape
    bins = quantize_boxes([mark], width, height)
    [[x1, y1, x2, y2]] = dequantize_boxes(bins, model_width, model_height).tolist()
    blur = 1 + 2 * max(model_width / width, model_height / height)  # of a pixel that was scaled, and a bin
    inside = brightness[ceil(y1 + blur) : floor(y2 - blur) + 1, ceil(x1 + blur) : floor(x2 - blur) + 1]
    assert inside.numel() > 0
    assert inside.max() < 0.25
    around = brightness.clone()
    around[max(0, floor(y1 - blur)) : ceil(y2 + blur) + 1, max(0, floor(x1 - blur)) : ceil(x2 + blur) + 1] = 1
    assert around.min() > 0.6


def test_a_turned_photograph_stands_upright_in_the_tensor(policy, tmp_path: Path):
    """Orientation 6: the first stored pixel belongs into the upper right corner."""
    questions = questions_template(policy.template, policy.model)
    encoded = encode_question(questions, MESSAGES, [str(write_picture(tmp_path, "turned.png"))])
    [[_, rows, columns]] = encoded["image_grid_thw"].tolist()
    assert rows == 2 * columns
    mean_red = red_of_patches(encoded["pixel_values"], rows, columns)
    assert mean_red[0, -1] == mean_red.max()
    assert torch.isclose(mean_red[0, -1], torch.tensor(1.0))  # 255, normalised
    assert mean_red[0, 0] < 0.9


def red_of_patches(pixels_PD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Mean red of each patch, [rows, columns]; the processor orders patches by blocks of 2 x 2."""
    red_P = pixels_PD.unflatten(1, (3, -1))[:, 0].mean(1)
    return red_P.reshape(rows // 2, columns // 2, 2, 2).transpose(1, 2).reshape(rows, columns)
