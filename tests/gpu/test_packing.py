"""Packs against samples in forwards of their own, float64 on the CPU: sdpa with its mask, flash attention with lengths.

One pack of three samples, the first with a picture. About 20 s on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.gpu import Say, error, needs
from torch import Tensor, nn

from coordexp.geometry import IntArray
from coordexp.models.tiny import build_tiny_model
from coordexp.packing.layout import SampleBatch, block_causal_mask, pack_samples
from coordexp.packing.position_ids import VisionLayout

pytestmark = pytest.mark.gpu

LENGTHS = (40, 33, 27)


class Picture(NamedTuple):
    pixel_values_PD: Tensor
    image_grid_thw_I3: np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    sample_id: str
    token_ids_T: IntArray
    media: Picture | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)


class Packed(NamedTuple):
    """Logits of all tokens, and the gradient of the embedding of a loss on all of them."""

    logits_TV: Tensor
    grad_VH: Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packing") / "model"
    build_tiny_model(path, preset="nano")
    return path


def load(folder: Path, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    """With weights large enough that attending to a neighbour shows; numbers of bfloat16."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = (
            (parameter.data + 0.1 * torch.randn(parameter.shape, generator=noise)).bfloat16().float()
        )
    return model.to(device, dtype).eval()


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    from transformers import AutoConfig

    config, g = AutoConfig.from_pretrained(folder), np.random.default_rng(0)
    made = [Sample(str(i), g.integers(40, 400, length), None) for i, length in enumerate(LENGTHS)]
    ids_T = made[0].token_ids_T
    ids_T[1:7] = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    pixels = torch.from_numpy(g.standard_normal((16, 3 * 2 * 8 * 8))).bfloat16().float()
    return [Sample("picture", ids_T, Picture(pixels, np.array([[1, 4, 4]]))), *made[1:]]


def run(model: nn.Module, batch: SampleBatch[Sample]) -> Packed:
    parameter = next(model.parameters())
    inputs = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.model_inputs().items()
    }
    model.zero_grad()
    logits_TV = model(**inputs).logits[0]
    log_probs_TV = logits_TV.log_softmax(-1, dtype=torch.promote_types(parameter.dtype, torch.float32))
    taught_T = batch.input_ids_BT[0].to(parameter.device)
    (-log_probs_TV.gather(1, taught_T.unsqueeze(1)).sum()).backward()
    embedding: Any = model
    return Packed(logits_TV.detach(), embedding.get_input_embeddings().weight.grad.clone())


@pytest.fixture(scope="module")
def singles(folder: Path, samples: list[Sample]) -> Packed:
    """Each sample in a forward of its own, in float64 on the CPU."""
    model = load(folder, "sdpa", torch.device("cpu"), torch.float64)
    layout = VisionLayout.from_config(model.config)
    alone = [run(model, pack_samples([sample], layout)) for sample in samples]
    return Packed(
        torch.cat([one.logits_TV for one in alone]), torch.stack([one.grad_VH for one in alone]).sum(0)
    )


def packed(
    folder: Path, samples: list[Sample], attention: str, device: torch.device, dtype: torch.dtype, **how: Any
) -> Packed:
    model = load(folder, attention, device, dtype)
    return run(model, pack_samples(samples, VisionLayout.from_config(model.config), **how))


def leaking(folder: Path, samples: list[Sample], device: torch.device, dtype: torch.dtype) -> Packed:
    """As if nothing kept samples apart: a causal mask over the whole pack."""
    model = load(folder, "sdpa", device, dtype)
    batch = pack_samples(samples, VisionLayout.from_config(model.config), mask_dtype=torch.bool)
    assert batch.attention_mask is not None
    batch.attention_mask.copy_(block_causal_mask([sum(LENGTHS)]))
    return run(model, batch)


def off(found: Packed, expected: Packed) -> tuple[float, float]:
    return error(found.logits_TV, expected.logits_TV), error(found.grad_VH, expected.grad_VH)


@pytest.mark.parametrize("mask", ["of position ids", "explicit"])
def test_sdpa_keeps_samples_apart(
    folder: Path,
    samples: list[Sample],
    singles: Packed,
    device: torch.device,
    exact_products: None,
    mask: str,
    say: Say,
):
    how = {"mask_dtype": torch.bool} if mask == "explicit" else {}
    found = off(packed(folder, samples, "sdpa", device, torch.float32, **how), singles)
    leak = off(leaking(folder, samples, device, torch.float32), singles)
    say(
        f"sdpa, mask {mask}, float32 / alone, float64: logits off by {found[0]:.1e}, gradient by {found[1]:.1e} "
        f"({leak[0]:.1e}, {leak[1]:.1e} without a mask between samples)"
    )
    assert found[0] < 1e-4
    assert found[1] < 1e-4
    assert min(leak) > 1e-2


def test_flash_attention_is_no_further_off_than_sdpa_with_a_mask(
    folder: Path, samples: list[Sample], singles: Packed, cuda: torch.device, say: Say
):
    needs("flash-attn")
    flash = off(packed(folder, samples, "flash_attention_2", cuda, torch.bfloat16), singles)
    sdpa = off(packed(folder, samples, "sdpa", cuda, torch.bfloat16, mask_dtype=torch.bool), singles)
    leak = off(leaking(folder, samples, cuda, torch.bfloat16), singles)
    say(
        f"flash attention, bfloat16 / samples alone, float64: logits off by {flash[0]:.1e}, gradient by {flash[1]:.1e} "
        f"(sdpa with a mask {sdpa[0]:.1e}, {sdpa[1]:.1e}; without one {leak[0]:.1e}, {leak[1]:.1e})"
    )
    for ours, theirs, mixed in zip(flash, sdpa, leak, strict=True):
        assert ours < 1.5 * theirs + 1e-3
        assert ours < mixed / 3
