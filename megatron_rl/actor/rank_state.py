"""The part of a checkpoint that one rank writes and reads: tensors under Hugging Face names, for any layout to load.

Every kind of tensor (`weights`, Adam's `exp_avg` and `exp_avg_sq`, and the `lagged` snapshot if there is one) has the
shapes of the weights, so one weight map serves them all. Tensors are gathered one at a time and divided among the ranks
of a pipeline stage for writing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_rl.actor.optimizer.optimizer import Optimizer
from megatron_rl.actor.optimizer.state import KINDS, read_state, set_state
from megatron_rl.checkpoint import rng, shards
from megatron_rl.checkpoint.manifest import RandomState, RankPart, ShardFile, read_manifest, read_rng
from megatron_rl.checkpoint.shards import ShardTensors
from megatron_rl.models.hf_shards import HfShard, write_hf_shards
from megatron_rl.models.weight_map import Stage, export_hf_weights, import_values, publish_hf_weights
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.utils import heartbeat


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A file to be written, with its tensors in CPU memory."""

    name: str
    kind: str
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> tuple[str, ShardFile]:
        return self.name, shards.write_shard(folder / self.name, self.kind, self.tensors)


@dataclass(frozen=True, slots=True)
class HeldState:
    """A copy of a rank's state in CPU memory, to be written while training continues."""

    shards: list[Shard]
    rng: RandomState
    optimizer_steps: int

    def write(self, folder: Path) -> RankPart:
        return RankPart(dict(shard.write(folder) for shard in self.shards), self.rng, self.optimizer_steps)


@dataclass(frozen=True, slots=True, eq=False)
class RankState:
    """Everything that a rank needs to resume exactly. All methods are collective except `bytes`."""

    model: Stage
    hf_config: Mapping[str, Any]
    optimizer: Optimizer
    snapshot: Mapping[str, Tensor]
    """The lagged weights by parameter name, in CPU memory; empty if there are none."""
    layout: Layout
    rank: int

    @property
    def bytes(self) -> float:
        """This rank's share of a checkpoint, assuming that each parameter is divided evenly among its replicas."""
        total = 0.0
        for name, parameter in self.model.named_parameters():
            lagged = self.snapshot[name].element_size() if self.snapshot else 0
            total += parameter.numel() * (len(KINDS) * 4 + lagged) / process_groups.replicas_of(parameter).size()
        return total

    def write(self, folder: Path) -> RankPart:
        """Write the state, holding at most one file in memory."""
        kinds, steps = self._kinds()
        files: dict[str, ShardFile] = {}
        failure = None
        for shard in self._shards(kinds):
            heartbeat.notify(f"writing {shard.name}")
            try:
                if failure is None:
                    files.update([shard.write(folder)])
            except OSError as error:  # the other ranks need this one for their gathers
                failure = error
        if failure is not None:
            raise failure
        return RankPart(files, self._rng(), steps)

    def held(self) -> HeldState:
        """Returns a copy of the state in CPU memory."""
        kinds, steps = self._kinds()
        return HeldState(list(self._shards(kinds)), self._rng(), steps)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Restore weights and optimizer state exactly, from any layout, and random states if the layout is the same.

        Returns the lagged snapshot, empty if none was saved. Raises UserError if the tensors do not fit the model.
        """
        manifest = read_manifest(folder)
        set_state(self.optimizer, self.model, self._parts(folder, manifest.files), manifest.optimizer_steps)
        if manifest.origin.layout == asdict(self.layout):
            tracked = rng.restore(read_rng(folder).ranks[self.rank])
            if tracked:
                get_cuda_rng_tracker().set_states(tracked)
        lagged = ShardTensors(folder, manifest.files, "lagged")
        return dict(import_values(self.model, self.hf_config, lagged)) if lagged else {}

    @torch.no_grad()
    def _parts(self, folder: Path, files: Mapping[str, ShardFile]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields each parameter's name and its tensor of every kind, after copying the weight into the parameter."""
        parameters = dict(self.model.named_parameters())
        streams = [import_values(self.model, self.hf_config, ShardTensors(folder, files, kind)) for kind in KINDS]
        for shares in zip(*streams, strict=True):
            name = shares[0][0]
            heartbeat.notify(f"loading {name}")
            parts = {kind: part for kind, (_, part) in zip(KINDS, shares, strict=True)}
            parameters[name].copy_(parts["weights"])
            yield name, parts

    def _rng(self) -> RandomState:
        return rng.capture(get_cuda_rng_tracker().get_states())

    def _shards(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Shard]:
        """Yields this rank's files. Every rank of a stage must draw all of its files: the gathers are collective."""
        count = self.layout.world_size // self.layout.pipeline
        loads, mine = [0] * count, self.rank % count
        for kind, values in kinds.items():
            part, held, size = 0, dict[str, Tensor](), 0
            for name, tensor in export_hf_weights(self.model, self.hf_config, values):
                writer = loads.index(min(loads))
                loads[writer] += tensor.nbytes
                if writer != mine:
                    continue
                if held and size + tensor.nbytes > shards.FILE_BYTES:
                    yield Shard(self._file(kind, part), kind, held)
                    part, held, size = part + 1, {}, 0
                held[name] = tensor.to("cpu", copy=True)
                size += tensor.nbytes
            if held:
                yield Shard(self._file(kind, part), kind, held)

    def _kinds(self) -> tuple[dict[str, Mapping[str, Tensor]], int]:
        """Returns kind -> parameter name -> tensor, each made on access, and the number of optimizer steps."""
        state, steps = read_state(self.optimizer, self.model)
        kinds = dict(state)
        if self.snapshot:
            kinds["lagged"] = _OnDevice(self.snapshot, next(self.model.parameters()).device)
        return kinds, steps

    def _file(self, kind: str, part: int) -> str:
        return f"{kind}-rank-{self.rank}-part-{part}.safetensors"


class _OnDevice(Mapping[str, Tensor]):
    """CPU tensors that are copied to the device on access: NCCL gathers only tensors on the device."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def export_stage(
    folder: Path, model: Stage, hf_config: Mapping[str, Any], stage: int, publishes: bool
) -> list[HfShard] | None:
    """Write the weight files of this pipeline stage on the publishing rank, holding at most one file in memory.

    Collective over the ranks that share a layer. Returns None on the other ranks.
    """
    tensors = publish_hf_weights(model, hf_config)
    try:
        return write_hf_shards(folder, tensors, part=stage) if publishes else None
    finally:
        for _ in tensors:  # the other ranks need this one for their gathers, also when its disk is full
            pass
