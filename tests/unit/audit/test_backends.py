"""Pixels of an engine that normalises them itself."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from coordexp.audit.backends import as_bytes


def test_normalised_patches_become_the_bytes_they_were_made_of():
    """Every byte in every channel, with another mean and spread in each."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    bytes_PD = torch.randint(0, 256, (64, 3 * 32), dtype=torch.uint8)
    bytes_PD[0], bytes_PD[1:9, :32] = 255, torch.arange(256, dtype=torch.uint8).view(8, 32)
    scaled_PCd = bytes_PD.float().view(64, 3, 32) / 255
    patches_PD = ((scaled_PCd - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).flatten(1)
    assert torch.equal(as_bytes(patches_PD, SimpleNamespace(image_mean=mean, image_std=std)), bytes_PD)
