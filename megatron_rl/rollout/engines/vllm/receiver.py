"""The receiver of weight updates inside a vLLM worker. Only this file and `batch_endpoint.py` import vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_rl.weight_sync.buckets import TensorSpec, unflatten
from megatron_rl.weight_sync.digest_queue import DigestQueue, digests
from megatron_rl.weight_sync.process_group import BroadcastGroup
from megatron_rl.weight_sync.receivers import RECEIVERS, TensorReceiver
from megatron_rl.weight_sync.transport import GroupMember


@dataclass
class Groups:
    """The groups to join, one per pipeline stage of the actor; earlier groups are left."""

    members: list[dict[str, Any]]


@dataclass
class Portion:
    """A part of an update: a bucket that comes over a group, or files to read."""

    group: str = ""
    bucket: list[tuple[str, str, list[int]]] = field(default_factory=list)
    """(name, type, shape) of each tensor."""
    then: list[tuple[str, int]] = field(default_factory=list)
    """Group and bytes of the bucket after this one, if any: it is received while this one is loaded."""
    files: list[str] = field(default_factory=list)
    take_checksums: bool = False


class Receiver(WeightTransferEngine[Groups, Portion]):
    """Loads each bucket as it arrives; vLLM converts a layer to its own format once the layer is complete.

    A worker that raises an error ends vLLM. The receiver therefore keeps errors, and `Extension` reports them.
    """

    init_info_cls = Groups
    update_info_cls = Portion

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.received: dict[str, Future[str]] = {}
        """Checksums of the tensors received in the last update, if they were taken."""
        self._digests = DigestQueue()
        self._ahead: dict[str, torch.Tensor] = {}
        """Memory of the bucket that is being received, by group."""
        self.failure: str | None = None
        self.updating = False
        """Between the start and the finish of an update."""
        self._groups: dict[str, BroadcastGroup | TensorReceiver] = {}

    def init_transfer_engine(self, init_info: Groups) -> None:
        self.shutdown()
        self.failure = None
        members = [GroupMember(**member) for member in init_info.members]
        with self._keep_failure():
            for member in members:
                self._groups[member.name] = self._join(member)

    def _join(self, member: GroupMember) -> BroadcastGroup | TensorReceiver:
        if member.transport in RECEIVERS:
            return RECEIVERS[member.transport](member, self.parallel_config.rank, self.device)
        return BroadcastGroup(member, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        self.failure, self.received, self.updating = None, {}, True
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Does what the base class does, but without its synchronisation, which fails if there is no accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Portion) -> None:
        if self.failure:
            return
        with self._keep_failure(), self._tensors(update_info) as tensors:
            # One call for all tensors: each call of vLLM lists the parameters of the whole model.
            self.model.load_weights(self._watched(tensors) if update_info.take_checksums else tensors)

    def _watched(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self.received[name] = self._digests.add(tensor)
            yield name, tensor

    def finish_weight_update(self) -> None:
        self.updating = False
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):  # a tied head has a packed copy that vLLM does not renew
                    module.quant_method.process_weights_after_loading(module)

    @contextmanager
    def _tensors(self, portion: Portion) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Gives each tensor memory of its own, which a layer may keep until the rest of the layer has arrived."""
        specs = [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in portion.bucket]
        group = self._groups.get(portion.group)
        if isinstance(group, TensorReceiver):
            with group.bucket(specs) as tensors:
                yield tensors
        elif group is not None:
            yield self._broadcast(specs, portion)
        elif not specs:
            yield self._read(portion.files)
        else:
            raise RuntimeError(f"it is not in the group {portion.group}")

    def _read(self, files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            with safe_open(file, framework="pt", device=str(self.device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, tensors.get_tensor(name)

    def _broadcast(self, specs: Sequence[TensorSpec], portion: Portion) -> Iterator[tuple[str, torch.Tensor]]:
        if portion.group not in self._ahead:
            self._begin(portion.group, sum(spec.nbytes for spec in specs))
        self._member(portion.group).finish()
        flat = self._ahead.pop(portion.group)
        for group, nbytes in portion.then:
            self._begin(group, nbytes)
        for name, tensor in unflatten(flat, specs):
            yield name, tensor.clone()

    def _begin(self, group: str, nbytes: int) -> None:
        self._ahead[group] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._member(group).start(self._ahead[group])

    def _member(self, group: str) -> BroadcastGroup:
        member = self._groups[group]
        assert isinstance(member, BroadcastGroup), group
        return member

    @contextmanager
    def _keep_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a raised error would leave an update open that vLLM considers finished
            self.failure = f"{type(error).__name__}: {error}"

    def shutdown(self) -> None:
        groups, self._groups, self._ahead = self._groups, {}, {}
        for group in groups.values():
            group.leave() if isinstance(group, BroadcastGroup) else group.close()


class Extension:
    """Methods that vLLM adds to a worker (`--worker-extension-cls`)."""

    weight_transfer_engine: Receiver
    model_runner: Any
    finish_weight_update: Callable[[], None]
    """The worker's own method."""

    def weight_failure(self) -> list[str]:
        """Why the last update, or the last joining of groups, failed in this worker; empty if it did not fail."""
        return [self.weight_transfer_engine.failure] if self.weight_transfer_engine.failure else []

    def end_open_update(self) -> None:
        """Ends an update whose sender ended in the middle: vLLM ends if another update begins while one is open."""
        if self.weight_transfer_engine.updating:
            self.finish_weight_update()

    def received_checksums(self) -> dict[str, str]:
        return {name: value.result() for name, value in self.weight_transfer_engine.received.items()}

    def held_checksums(self) -> dict[str, str]:
        """Checksums of this worker's parameters by `rank:name`, taken where the parameters lie: vLLM's own
        `/weight_checker` copies all of them to the host. Left out are modules that hold quantised weights, and
        parameters that vLLM has emptied because it has repacked them."""
        rank = get_tensor_model_parallel_rank()
        return digests(
            (f"{rank}:{module_name}.{name}", parameter)
            for module_name, module in self.model_runner.get_model().named_modules()
            if not any("scale" in name for name, _ in module.named_parameters(recurse=False))
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.numel()
        )
