"""Reads the index of a distributed checkpoint, which is a pickle, without unpickling anything that could run code."""

from __future__ import annotations

import dataclasses
import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rl.conversion.torch_dist.keys import INDEX
from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_bytes


class Reader(dcp.FileSystemReader):
    """torch's reader, except that the index is unpickled once and through `_IndexUnpickler`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            path = Path(self.path) / INDEX
            try:
                if not path.exists():
                    raise UserError(f"{path} is missing: the checkpoint is unfinished, or was not copied completely.")
                self._metadata = _IndexUnpickler(io.BytesIO(read_bytes(path))).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
                raise UserError(f"{path} is not the index of a distributed checkpoint ({error}).") from error
        return self._metadata


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles only torch's checkpoint records and their parts; anything else raises UnpicklingError."""

    _PLAIN = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
            ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._PLAIN:
            return super().find_class(module, name)
        if "." not in name and (module == "torch" or module.startswith("torch.distributed.checkpoint.")):
            found = super().find_class(module, name)
            if isinstance(found, torch.dtype | torch.layout | torch.memory_format) or _is_record(found, module):
                return found
        raise pickle.UnpicklingError(f"the index refers to {module}.{name}")


def _is_record(found: Any, module: str) -> bool:
    """Returns whether `found` is a dataclass or an enum that is defined in that module itself."""
    known = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
    return known and found.__module__ == module
