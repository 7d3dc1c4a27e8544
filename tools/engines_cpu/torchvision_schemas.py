"""Lets torchvision's CUDA wheel be imported beside a CPU build of torch.

torchvision's compiled part defines these operators but does not load without CUDA. Its Python part only needs the
operators to exist. No text model calls them.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """An import hook that finds no module. It defines the operators when torchvision is first imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
