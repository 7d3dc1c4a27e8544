"""Megatron-core's distributed checkpoints (`torch_dist`), read and written a tensor at a time.

Such a folder is torch's own distributed checkpoint (DCP) beside two small files of Megatron's, so no process group, no
Megatron model and no more memory than a tensor's is needed. Keys are those of models with Transformer Engine, layer by
layer; read are also those of local layers, and of layers stacked along a first axis, as older Megatron writes them.
"""

from .keys import CONFIG, INDEX, RELEASE, TRACKER, is_torch_dist, resolve
from .read import TorchDistWeights
from .write import write_torch_dist

__all__ = [
    "CONFIG",
    "INDEX",
    "RELEASE",
    "TRACKER",
    "TorchDistWeights",
    "is_torch_dist",
    "resolve",
    "write_torch_dist",
]
