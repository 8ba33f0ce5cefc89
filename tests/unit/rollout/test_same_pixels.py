"""A picture gives the same pixels to training, to both engines, to a rollout server and to an OpenAI server."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.pictures import PICTURES, write_picture
from support.vllm import require_vllm

from coordexp.pictures import open_picture
from coordexp.rollout.backends.openai_client import chat_messages
from coordexp.rollout.types import RolloutRequest
from coordexp.swift_bridge.generation_prompts import encode_question, questions_template
from coordexp.swift_bridge.prompts import encode_prompt

MESSAGES = ({"role": "user", "content": "<image>Find all objects."},)


def fingerprint(pixels: torch.Tensor, grid: torch.Tensor) -> str:
    return hashlib.sha256(repr(grid.tolist()).encode() + pixels.numpy().tobytes()).hexdigest()


def by_training(policy: Any, path: Path) -> str:
    messages = [*MESSAGES, {"role": "assistant", "content": "{}"}]
    prompt = encode_prompt(policy.template, {"messages": messages, "images": [str(path)]})
    return fingerprint(prompt.pixel_values_PD, prompt.image_grid_thw_I3)


def by_transformers(policy: Any, image: str | bytes) -> str:
    encoded = encode_question(questions_template(policy.template, policy.model), MESSAGES, [image])
    return fingerprint(encoded["pixel_values"], encoded["image_grid_thw"])


def by_vllm(policy: Any, image: str | bytes) -> str:
    """What the template hands to vLLM, after vLLM's own turning of pictures, through the processor."""
    from vllm.multimodal.image import normalize_image

    questions = questions_template(policy.template, None)
    questions.set_mode("vllm")
    encoded = encode_question(questions, MESSAGES, [image])
    [picture] = encoded["images"]
    return processed(policy, normalize_image(picture), **encoded["mm_processor_kwargs"])


def by_openai(policy: Any, path: Path) -> str:
    """What `vllm serve` makes of what the client sends."""
    from vllm.multimodal.media import ImageMediaIO

    [message] = chat_messages(RolloutRequest(MESSAGES, (str(path),)))
    [uri] = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    loaded = ImageMediaIO().load_bytes(base64.b64decode(uri.partition(",")[2]))
    return processed(policy, loaded.media)


def processed(policy: Any, picture: Image.Image, **options: Any) -> str:
    made = policy.template.processor.image_processor(images=[picture], return_tensors="pt", **options)
    return fingerprint(made["pixel_values"], made["image_grid_thw"])


@pytest.mark.vllm
@pytest.mark.parametrize("name", PICTURES)
def test_every_way_of_a_picture_ends_in_the_same_tensor(policy, tmp_path: Path, name: str):
    require_vllm()
    path = write_picture(tmp_path, name)
    expected = processed(policy, open_picture(path), do_resize=False)
    assert by_training(policy, path) == expected
    for image in (str(path), path.read_bytes()):  # a rollout server is given bytes
        assert by_transformers(policy, image) == expected
        assert by_vllm(policy, image) == expected
    assert by_openai(policy, path) == expected


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
