"""Stands in for SGLang's CUDA kernels, which have no CPU build on the package index.

SGLang imports them by name at start-up and calls none of them on a CPU. A call raises NotImplementedError.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0+cpu"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments: Any, **_named: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this package is only a stand-in for CPUs")

    return missing
