"""The source of a conversion. Every format gives complete Hugging Face tensors, one weight map entry at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.checkpoint.as_model import find_checkpoint, trained_from, weight_files
from megatron_rl.checkpoint.manifest import MANIFEST
from megatron_rl.conversion import torch_dist
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.hf_format import FolderWeights, open_weights, read_config
from megatron_rl.models.weights_check import check_headers, check_names

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name of a dtype in a safetensors file -> torch dtype."""


class Weights(Protocol):
    """The weights of a complete model. Both methods raise UserError if a file is damaged."""

    def dtype(self, entry: Entry) -> torch.dtype: ...

    def read(self, entry: Entry) -> tuple[Tensor, ...]: ...


class NamedWeights:
    """Weights in safetensors files under Hugging Face names."""

    def __init__(self, weights: FolderWeights, architecture: Architecture) -> None:
        """Opens every file. Raises UserError if names, shapes or dtypes do not fit the model's config.json."""
        check_names(architecture, weights)
        headers = weights.headers()
        check_headers(architecture, headers)
        self._weights = weights
        self._dtypes = {name: DTYPES[header.dtype] for name, header in headers.items() if header.dtype in DTYPES}

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._dtypes[entry.hf_names[0]]

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        return tuple(self._weights[name] for name in entry.hf_names)


class ByName(Mapping[str, Tensor]):
    """The weights as a mapping from Hugging Face name to tensor. Each tensor is read on access."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        self._weights = weights
        self._places = {
            name: (entry, part) for entry in entries(architecture) for part, name in enumerate(entry.hf_names)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry, part = self._places[name]
        return self._weights.read(entry)[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Rounded:
    """Weights converted to another dtype."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def dtype(self, entry: Entry) -> torch.dtype:
        return self._dtype

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self._dtype) for tensor in self._weights.read(entry))


@dataclass(frozen=True, slots=True)
class Source:
    """A model whose files are opened and checked."""

    what: str
    """Name of the format, for messages."""
    folder: Path
    hf_folder: Path
    """Folder with config.json, tokenizer and the other files that are not weights."""
    hf_config: dict[str, Any]
    architecture: Architecture
    weights: Weights
    dtype: torch.dtype | None = None
    """Dtype to publish the model in. None means the stored dtype."""


def hf_folder_of(folder: Path, model: Path | None) -> Path:
    """Returns the folder with the model's config.json. Raises UserError if there is none."""
    if model is not None:
        return model
    if (folder / "config.json").is_file():
        return folder
    if torch_dist.is_torch_dist(folder):
        kept = [place / HF_FILES for place in (folder, folder.parent) if (place / HF_FILES / "config.json").is_file()]
        if kept:
            return kept[0]
        raise UserError(f"{folder} does not say which model it is. Name its Hugging Face folder with --model FOLDER.")
    return trained_from(_checkpoint(folder), "--model")


HF_FILES = "hf"
"""Folder in a Megatron checkpoint made by this project: the files of the model's folder that are not weights."""


def open_source(folder: Path, hf_folder: Path) -> Source:
    """Opens and checks a model. Raises UserError for an unknown family, and for missing, damaged or misshapen files."""
    hf_config = read_config(hf_folder)
    architecture = Architecture.from_hf(hf_config)

    def source(what: str, weights: Weights, dtype: torch.dtype | None = None) -> Source:
        return Source(what, folder, hf_folder, hf_config, architecture, weights, dtype)

    if (folder / "config.json").is_file():
        return source("Hugging Face folder", NamedWeights(open_weights(folder), architecture))
    if torch_dist.is_torch_dist(folder):
        return source("Megatron checkpoint", torch_dist.TorchDistWeights(folder, architecture))
    checkpoint = _checkpoint(folder)
    weights = NamedWeights(FolderWeights(checkpoint, weight_files(checkpoint)), architecture)
    # Checkpoints hold fp32 weights; a model is published in the dtype of its config.json.
    published = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return source("checkpoint of a run", weights, getattr(torch, published) if published else None)


def _checkpoint(folder: Path) -> Path:
    """Returns the checkpoint itself, or the newest one in a run's folder."""
    if found := find_checkpoint(folder):
        return found
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist.")
    raise UserError(
        f"{folder} cannot be converted. Expected a Hugging Face folder (config.json), a checkpoint of a run "
        f"({MANIFEST}), or a Megatron checkpoint ({torch_dist.TRACKER} or {torch_dist.CONFIG})."
    )
