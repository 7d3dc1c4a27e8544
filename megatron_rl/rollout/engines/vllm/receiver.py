"""The receiving side of weight updates, inside a vLLM worker. Beside it only `rollout/vllm_brief.py` imports vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import TensorSpec, unflatten
from megatron_rl.weight_sync.checksums import sha256
from megatron_rl.weight_sync.mapped import MappedReceiver
from megatron_rl.weight_sync.transport import GroupMember


@dataclass
class Groups:
    """The groups to be in, one a pipeline stage of the actor; those of before are left."""

    members: list[dict[str, Any]]


@dataclass
class Portion:
    """What comes next: a bucket over a group, or files to read."""

    group: str = ""
    bucket: list[tuple[str, str, list[int]]] = field(default_factory=list)
    """(name, type, shape) of each tensor."""
    files: list[str] = field(default_factory=list)
    take_checksums: bool = False


class Receiver(WeightTransferEngine[Groups, Portion]):
    """Loads each tensor as it comes; vLLM turns a layer into its own format when the layer is whole.

    A worker that raises takes vLLM down with it. So what goes wrong is kept, for `Extension` to tell who asks.
    """

    init_info_cls = Groups
    update_info_cls = Portion

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.received: dict[str, str] = {}
        """Checksums of what came with the last update, where they were taken."""
        self.failure: str | None = None
        self.updating = False
        """Between the start and the finish of an update."""
        self._groups: dict[str, dist.ProcessGroup | MappedReceiver] = {}

    def init_transfer_engine(self, init_info: Groups) -> None:
        self.shutdown()
        self.failure = None
        members = [GroupMember(**member) for member in init_info.members]
        with self._keep_failure():
            for member in members:
                self._groups[member.name] = self._join(member)

    def _join(self, member: GroupMember) -> dist.ProcessGroup | MappedReceiver:
        if member.mapped:
            return MappedReceiver(member, self.parallel_config.rank, self.device)
        return process_group.join(member, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        self.failure, self.received, self.updating = None, {}, True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class has it, but for a synchronisation that fails where there is no accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Portion) -> None:
        if self.failure:
            return
        with self._keep_failure(), self._tensors(update_info) as tensors:
            for name, tensor in tensors:
                if update_info.take_checksums:
                    self.received[name] = sha256(tensor)
                self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        self.updating = False
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):  # a tied one has a packed copy, which nobody else renews
                    module.quant_method.process_weights_after_loading(module)

    @contextmanager
    def _tensors(self, portion: Portion) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Each with memory of its own: a layer may keep it until the rest of the layer has come."""
        specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in portion.bucket]
        group = self._groups.get(portion.group)
        if isinstance(group, MappedReceiver):
            with group.bucket(specs) as tensors:
                yield tensors
        elif group is not None:
            yield self._broadcast(specs, group)
        elif not specs:
            yield self._read(portion.files)
        else:
            raise RuntimeError(f"it is not in the group {portion.group}")

    def _read(self, files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            with safe_open(file, framework="pt", device=str(self.device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, tensors.get_tensor(name)

    def _broadcast(self, specs: Sequence[TensorSpec], group: dist.ProcessGroup) -> Iterator[tuple[str, torch.Tensor]]:
        flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8, device=self.device)
        dist.broadcast(flat, group=group, group_src=0)
        for name, tensor in unflatten(flat, specs):
            yield name, tensor.clone()

    @contextmanager
    def _keep_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any other than kept would leave an update open that vLLM holds to be over
            self.failure = f"{type(error).__name__}: {error}"

    def shutdown(self) -> None:
        groups, self._groups = self._groups, {}
        for group in groups.values():
            group.close() if isinstance(group, MappedReceiver) else process_group.leave(group)


class Extension:
    """What a vLLM worker can be asked beside its own methods (`--worker-extension-cls`)."""

    weight_transfer_engine: Receiver
    finish_weight_update: Callable[[], None]
    """The worker's own."""

    def weight_failure(self) -> list[str]:
        """Why the last update, or the last meeting of groups, failed here; empty when it did not."""
        return [self.weight_transfer_engine.failure] if self.weight_transfer_engine.failure else []

    def end_open_update(self) -> None:
        """End an update whose sender went away in the middle: to begin another one beside it ends vLLM."""
        if self.weight_transfer_engine.updating:
            self.finish_weight_update()

    def received_checksums(self) -> dict[str, str]:
        return self.weight_transfer_engine.received
