"""Reads and writes Megatron-core's distributed checkpoints (`torch_dist`), one tensor at a time.

Such a folder is a distributed checkpoint of torch (DCP) with two small files of Megatron's, so neither a process group
nor a Megatron model is needed, and memory for one tensor is enough. The written keys are those of Transformer Engine
models, layer by layer. The reader also accepts the keys of local layers, and layers stacked along a first axis, as
older versions of Megatron write them.
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
