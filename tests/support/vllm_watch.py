"""Part of a vLLM worker in tests: writes down what enters the vision tower of the model that vLLM runs.

`vllm serve --worker-extension-cls support.vllm_watch.PictureWatch` gives a server's worker the method; it is called
by `POST /collective_rpc`, which the server has under VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.hooks import RemovableHandle


class PictureWatch:
    """model_runner: of the worker that this class is mixed into."""

    model_runner: Any

    def watch_pictures(self, folder: str) -> None:
        """From here on each call of the vision tower becomes a file 0, 1, ... in `folder`."""
        watch_tower(self.model_runner.get_model().visual, folder)


def watch_tower(tower: torch.nn.Module, folder: str | Path) -> list[RemovableHandle]:
    """Likewise for the tower of any model; of calls with several pictures the grid has several rows.

    Pixels are those that the patch embedding projects: vLLM normalises pictures in the tower, and calls its compiled
    parts past their hooks.
    """
    grids: list[torch.Tensor] = []

    def remember(_tower: Any, args: Any, kwargs: Any) -> None:
        grids.append(torch.as_tensor(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]).reshape(-1, 3))

    def write(_projection: Any, args: Any) -> None:
        number = len(list(Path(folder).glob("*.safetensors")))
        pixels_PD = args[0].detach().float().flatten(1).contiguous()
        tensors = {"pixels": pixels_PD, "grid": grids.pop().clone()}
        save_file(tensors, Path(folder) / f"{number:03d}.safetensors")

    return [
        tower.register_forward_pre_hook(remember, with_kwargs=True),
        tower.patch_embed.proj.register_forward_pre_hook(write),
    ]
