"""Writes a distributed checkpoint, making its tensors one at a time."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_rl.conversion.torch_dist.keys import (
    COMMON,
    CONFIG,
    RELEASE,
    TRACKER,
    extra_states,
    megatron_shape,
    place_of,
)
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.hf_shards import MAX_SHARD_BYTES


def write_torch_dist(
    folder: Path,
    architecture: Architecture,
    dtype: Callable[[Entry], torch.dtype],
    read: Callable[[Entry], Tensor],
    max_file_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Megatron-LM save folder with one checkpoint, `release`.

    read: returns the complete Megatron tensor of an entry. A file holds at most `max_file_bytes`, or one larger tensor;
    at most one file's tensors are in memory at a time.
    """
    release = folder / RELEASE
    release.mkdir(parents=True)
    planner = _StreamingPlanner(architecture, dtype, read)
    try:
        dcp.save({}, storage_writer=_Writer(release, max_file_bytes), planner=planner, no_dist=True)
    except CheckpointException as error:  # raise the cause: the exception holds one per rank
        raise next(iter(error.failures.values()))[0] from None
    layers = {"singleton_local_shards": False, "non_homogeneous_layers": True}
    torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": layers}, release / COMMON)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    (release / CONFIG).write_text(json.dumps(config))
    (folder / TRACKER).write_text(RELEASE)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, file by file: it holds one file's tensors until they are written, so memory is bounded too."""

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        super().__init__(folder)
        self._max_file_bytes = max_file_bytes

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        written: list[WriteResult] = []
        for number, items in enumerate(self._files(plan.items)):
            name = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=name)
            written += super().write_data(part, planner).value()
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future

    def _files(self, items: list[WriteItem]) -> Iterator[list[WriteItem]]:
        held: list[WriteItem] = []
        size = 0
        for item in items:
            if held and size + _bytes(item) > self._max_file_bytes:
                yield held
                held, size = [], 0
            held.append(item)
            size += _bytes(item)
        yield held


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Makes every tensor only when it is written, and does not keep it."""

    def __init__(
        self, architecture: Architecture, dtype: Callable[[Entry], torch.dtype], read: Callable[[Entry], Tensor]
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._make: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}
        items = []
        for entry in entries(architecture):
            item = _tensor_item(architecture, entry, dtype(entry))
            items.append(item)
            self._make[item.index] = partial(_chunk, read, entry, item)
        for key in extra_states(architecture):
            item = WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)
            items.append(item)
            self._make[item.index] = _no_state
        self._items = items

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._make[write_item.index]()


def _chunk(read: Callable[[Entry], Tensor], entry: Entry, item: WriteItem) -> Tensor:
    assert item.tensor_data is not None
    return read(entry).reshape(item.tensor_data.chunk.sizes)


def _tensor_item(architecture: Architecture, entry: Entry, dtype: torch.dtype) -> WriteItem:
    place, shape = place_of(architecture, entry), megatron_shape(architecture, entry)
    experts = () if architecture.experts is None or entry.expert is None else (architecture.experts.count,)
    offsets = torch.Size((*place.index, *(0,) * len(shape)))
    chunk = ChunkStorageMetadata(offsets, torch.Size((*(1,) * len(experts), *shape)))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size((*experts, *shape)))
    return WriteItem(MetadataIndex(place.key, offsets), WriteItemType.SHARD, tensor_data=data)


def _no_state() -> io.BytesIO:
    data = io.BytesIO()
    torch.save([None], data)
    return data
