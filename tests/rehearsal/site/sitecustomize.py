"""Python imports this file at its start, in every process of a rehearsal: its folder is first on PYTHONPATH.

Processes that never import torch stay as they are: what is changed is changed when it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls an action once, right after a module has been imported."""

    def __init__(self, module: str, action: Callable[[ModuleType], None]) -> None:
        self.module, self.action = module, action

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute, action = spec.loader.exec_module, self.action

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _cuda(torch: ModuleType) -> None:
    import cuda_on_cpu

    cuda_on_cpu.install()


def _extension(common: ModuleType) -> None:
    """Transformer Engine loads its C extension from a shared object, which is not there."""
    common.load_framework_extension = lambda framework: importlib.import_module(f"transformer_engine_{framework}")


def _names(extensions: ModuleType) -> None:
    """This module has the extension's names by `import *`, which finds only those that have a stand-in."""
    extensions.__getattr__ = importlib.import_module("transformer_engine_torch").__getattr__  # type: ignore


def _permutation(kernels: ModuleType) -> None:
    import moe_permutation

    moe_permutation.replace(kernels)


def _flex(flex_tree: ModuleType) -> None:
    """FlexAttention is a Triton kernel that torch compiles."""
    from tests.flex_reference import attend

    flex_tree.kernel = lambda: attend  # type: ignore[attr-defined]


DEVICE = os.environ.get("MEGATRON_RL_REHEARSAL")
"""`cuda`, or `cpu` to leave torch as it is."""
if DEVICE:
    for _module, _action in {
        **({"torch": _cuda, "megatron_rl.actor.model.flex_tree": _flex} if DEVICE == "cuda" else {}),
        "transformer_engine.common": _extension,
        "transformer_engine.pytorch.cpp_extensions": _names,
        "transformer_engine.pytorch.triton.permutation": _permutation,
    }.items():
        sys.meta_path.insert(0, _AfterImport(_module, _action))
