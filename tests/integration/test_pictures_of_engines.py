"""Ten photographs through training, transformers, a vLLM engine and `vllm serve`: what their vision towers see.

On Qwen's vocabulary and image sizes. About a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file
from support.photographs import KINDS, XYXY, write_photograph
from support.processes import ROOT
from support.rollout_server import openai_server
from support.seen_pictures import Seen, dark_box
from support.vllm import require_vllm
from transformers import AutoImageProcessor

from coordexp.geometry import dequantize_boxes, quantize_boxes
from coordexp.image_size import PixelLimits
from coordexp.models.model_files import write_pixel_limits

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

WAYS = ("training", "hf", "vllm", "openai")
MAX_PIXELS = 80_000
PATH = f"{ROOT}:{ROOT / 'tests'}"


class Ways(NamedTuple):
    model: Path
    marks: list[XYXY]
    seen: dict[str, list[Seen]]
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def ways(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ways:
    require_vllm()
    root = tmp_path_factory.mktemp("pictures")
    model, data, work = root / "model", root / "data", root / "work"
    shutil.copytree(real_model, model, copy_function=os.link)
    write_pixel_limits(model, None, MAX_PIXELS)
    data.mkdir()
    marks = [write_photograph(data, kind) for kind in KINDS]
    lines = []
    for kind, mark in zip(KINDS, marks, strict=True):
        bins = quantize_boxes([mark], kind.width, kind.height)[0].tolist()
        lines.append(
            json.dumps(
                {
                    "images": [kind.name], "width": kind.width, "height": kind.height,
                    "objects": [{"desc": "mark", "bbox_2d": bins}],
                }
            )
            + "\n"
        )  # fmt: skip
    (data / "photographs.jsonl").write_text("".join(lines))
    for way in WAYS:
        (work / way).mkdir(parents=True)
    program = Path(__file__).parent / "picture_ways_program.py"
    with openai_server(
        model, root / "server.log", "--worker-extension-cls", "support.vllm_watch.PictureWatch", PYTHONPATH=PATH,
        VLLM_SERVER_DEV_MODE="1",
    ) as url:  # fmt: skip
        done = subprocess.run(
            [sys.executable, program, model, data / "photographs.jsonl", work, url],
            capture_output=True, text=True, check=False, timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": PATH},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:] + (root / "server.log").read_text()[-2000:]
    seen = {way: [read_seen(path) for path in sorted((work / way).iterdir())] for way in WAYS}
    return Ways(model, marks, seen, json.loads((work / "facts.json").read_text()))


def read_seen(path: Path) -> Seen:
    tensors = load_file(path)
    return Seen(tensors["pixels"], tensors["grid"])


def test_towers_see_the_same_pixels_on_every_way(ways: Ways):
    """Grids are those of the size rule, also below the least size, of odd sides and above the cap.

    vLLM normalises in the tower, in another order of operations; a step of one in a byte would be 8e-3.
    """
    limits = PixelLimits.of_folder(ways.model)
    for index, kind in enumerate(KINDS):
        width, height = limits.fitted(kind.width, kind.height)
        assert 65_536 <= width * height <= MAX_PIXELS
        for way in WAYS:
            assert ways.seen[way][index].grid_13.tolist() == [[1, height // 16, width // 16]], (way, kind)
        pixels = {way: ways.seen[way][index].pixels_PD for way in WAYS}
        assert pixels["hf"].equal(pixels["training"]), kind
        assert pixels["openai"].equal(pixels["vllm"]), kind
        assert (pixels["vllm"] - pixels["training"]).abs().max() < 1e-6, kind
    assert all(len(ways.seen[way]) == len(KINDS) for way in WAYS)


def test_prompts_and_greedy_answers_are_the_same_on_every_way(ways: Ways):
    prompts = {way: ways.facts[way]["prompts"] for way in WAYS}
    assert prompts == dict.fromkeys(WAYS, prompts["training"])
    assert len({len(prompt) for prompt in prompts["hf"]}) > 3  # visual tokens differ in number
    found = {way: ways.facts[way]["answers"] for way in ("hf", "vllm", "openai")}
    assert found == dict.fromkeys(found, found["hf"])
    for way in ("vllm", "openai"):
        for ours, theirs in zip(ways.facts["hf"]["logprobs"], ways.facts[way]["logprobs"], strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4), way


@pytest.mark.parametrize("way", WAYS)
def test_boxes_of_the_models_frame_land_on_the_pixels_they_came_from(ways: Ways, way: str):
    """There and back: the mark's bins hold the dark pixels the model sees, and a box around those is the mark's."""
    processor = AutoImageProcessor.from_pretrained(ways.model)
    for kind, mark, seen in zip(KINDS, ways.marks, ways.seen[way], strict=True):
        brightness = seen.brightness(processor)
        high, wide = brightness.shape
        scale = max(wide / kind.width, high / kind.height)
        blur = 2 + 2 * scale  # pixels of the model's frame: of scaling, and a bin

        bins = quantize_boxes([mark], kind.width, kind.height)
        [[x1, y1, x2, y2]] = dequantize_boxes(bins, wide, high).tolist()
        inside = brightness[ceil(y1 + blur) : floor(y2 - blur) + 1, ceil(x1 + blur) : floor(x2 - blur) + 1]
        assert inside.numel() > 0, kind
        assert inside.max() < 0.25, kind
        around = brightness.clone()
        around[
            max(0, floor(y1 - blur)) : ceil(y2 + blur) + 1, max(0, floor(x1 - blur)) : ceil(x2 + blur) + 1
        ] = 1
        assert around.min() > 0.5, kind

        found = quantize_boxes([dark_box(brightness)], wide, high)
        back = dequantize_boxes(found, kind.width, kind.height)[0]
        tolerance = 1 + 1.5 / min(scale, 1.0) + max(kind.width, kind.height) / 999  # pixels of the photograph
        assert np.abs(back - np.array(mark)).max() <= tolerance, kind
