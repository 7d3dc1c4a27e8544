"""The receiver inside a vLLM worker. Stand-ins replace vLLM; tests/engines sends weights to the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rl.weight_sync.digest import digest

RECEIVER = "megatron_rl.rollout.engines.vllm.receiver"
A = TypeVar("A")
B = TypeVar("B")


class Base(Generic[A, B]):
    """Stands in for vLLM's base class."""

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, torch.device("cpu")


class Model:
    """Counts the calls that load weights: each lists all parameters of the model."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls.append([name for name, _ in weights])


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The receiver's module, imported with stand-ins of vLLM's."""
    layers, reload = "vllm.model_executor.layers.vocab_parallel_embedding", "vllm.model_executor.model_loader.reload"
    nothing = {"finalize_layerwise_reload": None, "initialize_layerwise_reload": lambda model: None}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 3},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.base": {"WeightTransferEngine": Base},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.model_loader": {},
        layers: {"ParallelLMHead": nn.Linear},
        reload: nothing,
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, RECEIVER, raising=False)
    yield importlib.import_module(RECEIVER)
    del sys.modules[RECEIVER]


@pytest.mark.parametrize("take", [False, True])
def test_all_tensors_of_a_portion_are_loaded_by_one_call(receiver: Any, tmp_path: Path, take: bool) -> None:
    weights = {f"layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(20)}
    save_file(weights, tmp_path / "bucket.safetensors")
    engine = receiver.Receiver(Model())
    engine.start_weight_update()
    engine.receive_weights(receiver.Portion(files=[str(tmp_path / "bucket.safetensors")], take_checksums=take))
    assert engine.failure is None
    (loaded,) = engine.model.calls
    assert sorted(loaded) == sorted(weights)
    received = {name: value.result() for name, value in engine.received.items()}
    assert received == ({name: digest(tensor) for name, tensor in weights.items()} if take else {})


def test_the_next_bucket_is_received_while_one_is_loaded(receiver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages take turns; each bucket arrives whole, and is on its way before the one before it is loaded."""
    seen: list[str] = []

    class Group:
        def __init__(self, name: str) -> None:
            self.name, self.sent, self.flat = name, 0, torch.empty(0)

        def start(self, flat: Tensor) -> None:
            seen.append(f"start {self.name}")
            self.flat = flat

        def finish(self) -> None:
            self.sent += 1
            self.flat.view(torch.float32).fill_(self.sent)

        def leave(self) -> None:
            seen.append(f"leave {self.name}")

    class Loaded(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            seen.extend(f"load {name} {tensor.tolist()}" for name, tensor in weights)

    monkeypatch.setattr(receiver, "BroadcastGroup", Group)
    engine = receiver.Receiver(Loaded())
    engine._groups = {"s0": Group("s0"), "s1": Group("s1")}
    engine.start_weight_update()
    order = [("s0", "a"), ("s1", "b"), ("s0", "c")]
    for i, (group, name) in enumerate(order):
        then = [(following, 8) for following, _ in order[i + 1 : i + 2]]
        engine.receive_weights(receiver.Portion(group=group, bucket=[(name, "float32", [2])], then=then))
    assert engine.failure is None
    assert seen == [
        *("start s0", "start s1", "load a [1.0, 1.0]"),
        *("start s0", "load b [1.0, 1.0]"),
        "load c [2.0, 2.0]",
    ]
    engine.shutdown()
    assert seen[-2:] == ["leave s0", "leave s1"] and not engine._ahead


def test_an_error_while_loading_is_kept(receiver: Any, tmp_path: Path) -> None:
    engine = receiver.Receiver(Model())
    engine.start_weight_update()
    engine.receive_weights(receiver.Portion(files=[str(tmp_path / "absent.safetensors")]))
    engine.receive_weights(receiver.Portion(group="other", bucket=[("a", "float32", [1])]))
    assert "absent.safetensors" in engine.failure


def test_checksums_leave_out_what_cannot_be_compared(receiver: Any) -> None:
    """Parameters that vLLM has repacked are empty, and quantised weights have scales beside them."""
    model = nn.Module()
    model.norm, model.packed, model.quantised = nn.LayerNorm(4, bias=False), nn.Linear(1, 1), nn.Linear(2, 2)
    model.packed.weight = model.packed.bias = nn.Parameter(torch.zeros(0))
    model.quantised.weight_scale_inv = nn.Parameter(torch.ones(1))
    worker = receiver.Extension()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    assert worker.held_checksums() == {"3:norm.weight": digest(model.norm.weight)}
