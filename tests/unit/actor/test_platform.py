from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import pytest
import torch

from megatron_rl.actor import platform
from megatron_rl.config.actor import ActorSettings
from megatron_rl.errors import UserError


@pytest.fixture
def retargeted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the functions that `prepare` would change, as in a process where none has been changed yet."""
    found: list[str] = []
    monkeypatch.setattr(platform, "_run_on_cpu", platform._run_on_cpu.__wrapped__)
    monkeypatch.setattr(platform, "_retarget", lambda function, twin="cpu": found.append(function.__qualname__))
    monkeypatch.setattr(platform, "_replace", lambda function, twin: found.append(function.__qualname__))
    monkeypatch.setattr(platform, "_device", None)
    return found


def test_an_unknown_megatron_version_is_refused_on_cpu(monkeypatch: pytest.MonkeyPatch, retargeted: list[str]) -> None:
    monkeypatch.setattr(platform, "megatron_version", lambda: "0.99.0")
    with pytest.raises(UserError, match=r"0\.99\.0.*known are 0\.16 to 0\.19.*megatron-core>=0\.16,<0\.20"):
        platform.prepare("cpu")
    assert retargeted == []


def test_the_error_for_a_missing_megatron_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise platform.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(platform.importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"not installed.*pip install"):
        platform.megatron_version()


def test_preparing_for_cpu_changes_every_listed_function(retargeted: list[str]) -> None:
    assert platform.prepare("cpu") == torch.device("cpu")
    at_least = sum(map(len, [*platform.CUDA_SITES.values(), platform.RANDOM_SITES, platform.CPU_TWINS]))
    assert len(retargeted) >= at_least
    assert {"RotaryEmbedding.get_emb", "P2PCommunicator._communicate", "get_grad_norm_fp32"} <= set(retargeted)


def test_preparing_for_cuda_only_selects_the_local_gpu(monkeypatch: pytest.MonkeyPatch, retargeted: list[str]) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(platform, "megatron_version", lambda: "0.99.0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert platform.prepare("auto") == torch.device("cuda", 3)
    assert chosen == [torch.device("cuda", 3)]
    assert retargeted == []


def test_without_a_gpu_auto_means_cpu_and_cuda_is_refused(
    monkeypatch: pytest.MonkeyPatch, retargeted: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert platform.prepare("auto").type == "cpu"
    with pytest.raises(UserError, match=r"actor\.device is 'cuda'"):
        platform.prepare("cuda")


def test_preparing_twice_is_harmless() -> None:
    platform.prepare("cpu")
    platform.prepare("cpu")
    assert (
        platform.describe(torch.float32) == f"cpu, megatron-core {platform.megatron_version()}, local layers, no Apex"
    )


@pytest.mark.parametrize("settings", [{"context_parallel": 2}, {"fp8": "blockwise"}, {"expert_gemm": "grouped"}])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_that_need_transformer_engine_are_refused_without_it(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], device: str
) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(UserError, match=rf"actor\.{key}: {value} needs Transformer Engine.*CUDA only"):
        platform.require(torch.device(device), ActorSettings(**settings, dtype="bfloat16"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if device == "cuda":
        platform.require(torch.device(device), ActorSettings(**settings, dtype="bfloat16"))
    with pytest.raises(UserError, match="in bfloat16"):
        platform.require(torch.device(device), ActorSettings(**settings, dtype="float32"))
    platform.require(torch.device(device), ActorSettings())


def test_prefix_tree_packing_is_the_default_except_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in (False, True):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found or None)
        for device in (torch.device("cpu"), torch.device("cuda")):
            engine = installed and device.type == "cuda"
            auto, asked = (ActorSettings(dtype="bfloat16", **rows) for rows in ({}, {"rows": "prefix_tree"}))
            assert platform.packing_form(auto, device) == ("packed" if engine else "prefix_tree")
            assert platform.packing_form(asked, device) == "prefix_tree"
            platform.require(device, auto)
            if engine:
                with pytest.raises(UserError, match=r"actor\.rows: prefix_tree does not work with Transformer Engine"):
                    platform.require(device, asked)
            else:
                platform.require(device, asked)


def test_retargeting_changes_names_constants_and_inner_functions() -> None:
    def outer(tensor: torch.Tensor) -> tuple[str, str, bool, str]:
        def inner() -> str:
            return str(torch.cuda.current_device())

        return (
            inner(),
            torch.zeros(1, device="cuda").device.type,
            tensor.type() in ["torch.cuda.HalfTensor"],
            "cudagraph",
        )

    platform._retarget(cast(FunctionType, outer))
    assert outer(torch.zeros(1).half()) == ("cpu", "cpu", True, "cudagraph")


def nothing_to_do() -> str:
    return "cpu"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("moe_utils.RouterGatingLinearFunction", "forward"),
        ("token_dispatcher.MoEAlltoAllTokenDispatcher", "_maybe_dtoh_and_synchronize"),
    ],
)
def test_a_changed_expert_layer_in_megatron_raises_an_error(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    monkeypatch.setattr(f"megatron.core.transformer.moe.{place}.{name}", lambda: None)
    with pytest.raises(RuntimeError, match="megatron-core changed"):
        platform._adapt_experts()


@pytest.mark.parametrize(
    "break_in",
    [
        lambda: platform._retarget(cast(FunctionType, nothing_to_do)),
        lambda: platform._replace(cast(FunctionType, nothing_to_do), lambda device: device),
        lambda: platform._find("utils:no_such_function"),
        lambda: platform._find("optimizer.optimizer:FP32Optimizer.no_such_method"),
    ],
)
def test_a_changed_function_in_megatron_raises_an_error(break_in: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="megatron-core changed"):
        break_in()
