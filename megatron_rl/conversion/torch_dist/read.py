"""Reads a model's weights from a distributed checkpoint, one tensor at a time."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rl.conversion.torch_dist.index import Reader
from megatron_rl.conversion.torch_dist.keys import CONFIG, Place, megatron_shape, places, resolve
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.fusion import join
from megatron_rl.utils.bounded import read_json_object


class TorchDistWeights:
    """A model's weights in a distributed checkpoint, as complete Hugging Face tensors."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        """Raises UserError if the checkpoint is damaged or of another format or model."""
        self._folder, self._architecture = resolve(folder), architecture
        _check_config(self._folder)
        self._reader = Reader(self._folder)
        self._reader.set_up_storage_reader(self._reader.read_metadata(), is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._check_shapes()

    def dtype(self, entry: Entry) -> torch.dtype:
        dtype: torch.dtype = self._tensors[self._find(entry).key].properties.dtype
        return dtype

    def read(self, entry: Entry) -> tuple[Tensor, ...]:
        """Returns the Hugging Face tensors of an entry. Raises UserError if a file is missing or damaged."""
        place, shape = self._find(entry), megatron_shape(self._architecture, entry)
        target = torch.empty(*(1,) * len(place.index), *shape, dtype=self.dtype(entry))
        offsets = torch.Size((*place.index, *(0,) * len(shape)))
        try:
            planner = _PartPlanner(target, offsets)
            planner.set_up_planner({place.key: target}, self._reader.read_metadata(), is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self._folder} is damaged: {place.key} cannot be read ({error}). Copy it again."
            ) from error
        return tuple(join(entry.rule.kind, [target.reshape(shape)], self._architecture))

    def _find(self, entry: Entry) -> Place:
        return next(place for place in places(self._architecture, entry) if place.key in self._tensors)

    def _check_shapes(self) -> None:
        problems = []
        for entry in entries(self._architecture):
            possible = list(places(self._architecture, entry))
            place = next((place for place in possible if place.key in self._tensors), None)
            if place is None:
                problems.append(f"missing: {possible[0].key}")
                continue
            found = tuple(self._tensors[place.key].size)[len(place.index) :]
            wanted = megatron_shape(self._architecture, entry)
            padded = entry.rule.kind == "vocab" and found[1:] == wanted[1:] and found[0] >= wanted[0]
            if found != wanted and not padded:
                problems.append(f"{place.key}: shape {found}, expected {wanted}")
        if problems:
            shown = "\n  ".join(list(dict.fromkeys(problems))[:10])
            raise UserError(f"{self._folder} does not hold the model that config.json describes:\n  {shown}")


class _PartPlanner(dcp.DefaultLoadPlanner):
    """Plans the reading of one part of one tensor."""

    def __init__(self, target: Tensor, offsets: torch.Size) -> None:
        super().__init__()
        self._target, self._offsets = target, offsets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        ((key, _),) = self.state_dict.items()
        part = ChunkStorageMetadata(self._offsets, self._target.size())
        stored = self.metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        return LoadPlan(create_read_items_for_chunk_list(key, stored, [part]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def _check_config(folder: Path) -> None:
    try:
        backend = read_json_object(folder / CONFIG)["sharded_backend"]
    except (UserError, KeyError) as error:
        raise UserError(
            f"{folder} is not a Megatron distributed checkpoint: {CONFIG} cannot be read ({error})."
        ) from None
    if backend != "torch_dist":
        raise UserError(f"{folder} is a {backend} checkpoint; only torch_dist is read. Save it again with Megatron.")
