"""Two runs on the same pictures, for tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support.scored_runs import make_run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of all images but number 3."""
    folder = tmp_path_factory.mktemp("data")
    for image_id in range(12):
        if image_id != 3:
            Image.new("RGB", (320, 320), (20 * image_id, 90, 120)).save(folder / f"{image_id}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "loose", seed=1, noise=0.15, data=data),
        make_run(folder / "tight", seed=2, noise=0.03, data=data),
    ]
