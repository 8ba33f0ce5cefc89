"""Let a torchvision wheel built for CUDA import beside a CPU build of torch.

torchvision loads its compiled operators from a CUDA library; without one, its Python code fails to register fake
kernels for `torchvision::nms`, and Qwen3-VL's processor needs torchvision for nothing but image transforms. Defining
the operator schemas first is enough. Installed into site-packages by install.py with a .pth file, only where
`import torchvision` fails; it acts when torchvision is first imported.
"""

import importlib.abc
import sys


class _DefineOperatorsFirst(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library = library  # the definitions live as long as this object
        _KEEP.append(self)
        return None


_KEEP = []
sys.meta_path.insert(0, _DefineOperatorsFirst())
