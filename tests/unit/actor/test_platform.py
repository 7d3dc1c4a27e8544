from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import pytest
import torch

from megatron_rl.actor import platform
from megatron_rl.actor.platform import cpu
from megatron_rl.config.actor import ActorSettings
from megatron_rl.errors import UserError


@pytest.fixture
def retargeted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the functions that `prepare` would change, as in a process where none has been changed yet."""
    found: list[str] = []
    monkeypatch.setattr(cpu, "run_on_cpu", cpu.run_on_cpu.__wrapped__)
    monkeypatch.setattr(cpu, "_retarget", lambda function, twin="cpu": found.append(function.__qualname__))
    monkeypatch.setattr(cpu, "_replace", lambda function, twin: found.append(function.__qualname__))
    monkeypatch.setattr(platform, "_device", None)
    return found


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Makes torch see a GPU, and records the devices that are selected."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def have(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """Makes the packages have these versions; an underscore stands for a hyphen."""
    real, fakes = importlib.metadata.version, {name.replace("_", "-"): version for name, version in given.items()}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fakes.get(name) or real(name))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("package", "version", "remedy"),
    [
        ("megatron_core", "0.99.0", r"megatron-core 0\.99\.0 is installed.*'megatron-core>=0\.16\.1,<0\.20'"),
        ("torch", "2.8.0a0+34c6371d24.nv25.8", r"torch 2\.8\.0a0.*'torch>=2\.8'"),
        ("transformer_engine", "2.1.0", r"transformer-engine 2\.1\.0.*>=2\.4.*or uninstall"),
    ],
)
def test_a_version_outside_the_window_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    retargeted: list[str],
    one_gpu: list[torch.device],
    device: str,
    package: str,
    version: str,
    remedy: str,
) -> None:
    have(monkeypatch, **{package: version})
    if package == "transformer_engine" and device == "cpu":
        assert platform.prepare(device).type == "cpu"  # a CPU does not use the package
        return
    with pytest.raises(UserError, match=remedy):
        platform.prepare(device)
    assert retargeted == [] and one_gpu == []


def test_the_error_for_a_missing_megatron_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"not installed.*pip install"):
        platform.megatron_version()


def test_preparing_for_cpu_changes_every_listed_function(retargeted: list[str]) -> None:
    assert platform.prepare("cpu") == torch.device("cpu")
    at_least = sum(map(len, [*cpu.CUDA_SITES.values(), cpu.RANDOM_SITES, cpu.CPU_TWINS]))
    assert len(retargeted) >= at_least
    assert {"RotaryEmbedding.get_emb", "P2PCommunicator._communicate", "get_grad_norm_fp32"} <= set(retargeted)


def test_kernels_of_transformer_engine_give_way_to_torch_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, retargeted: list[str]
) -> None:
    """megatron-core takes these names from Transformer Engine or Apex where it finds one of them."""
    for module, names in cpu.TORCH_TWINS.items():
        for name in names:
            monkeypatch.setattr(f"megatron.core.{module}.{name}", "a kernel for GPUs", raising=False)
    platform.prepare("cpu")
    found = importlib.import_module("megatron.core.optimizer")
    assert found.Adam is torch.optim.AdamW and found.USING_PYTORCH_OPTIMIZER is True
    for module, names in cpu.TORCH_TWINS.items():
        for name in names:
            assert getattr(importlib.import_module(f"megatron.core.{module}"), name) != "a kernel for GPUs"


def test_preparing_for_cuda_only_selects_the_local_gpu(
    monkeypatch: pytest.MonkeyPatch, retargeted: list[str], one_gpu: list[torch.device]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert platform.prepare("auto") == torch.device("cuda", 3)
    assert one_gpu == [torch.device("cuda", 3)]
    assert retargeted == []


def test_the_router_finds_its_matrix_product_on_every_device(
    monkeypatch: pytest.MonkeyPatch, retargeted: list[str], one_gpu: list[torch.device]
) -> None:
    """Without Transformer Engine megatron-core 0.16 tests a name that it never defined."""
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    platform.prepare("cuda")
    assert moe_utils.te_general_gemm is None


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
        platform.describe(ActorSettings()) == f"cpu, megatron-core {platform.megatron_version()}, local layers, no Apex"
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
            assert platform.uses_flex(asked, device) == engine and not platform.uses_flex(auto, device)
            for settings in (auto, asked):
                platform.require(device, settings)


@pytest.mark.parametrize(
    ("settings", "missing", "reason"),
    [
        ({}, "triton", "Triton, which compiles FlexAttention, is not installed"),
        (
            {"attention_backend": "flash"},
            None,
            "actor.attention_backend: flash asks for an attention that has no prefix",
        ),
    ],
)
def test_rows_are_packed_and_the_log_says_why_if_flex_attention_is_missing(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], missing: str | None, reason: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    cuda = torch.device("cuda")
    monkeypatch.setattr(platform, "_device", cuda)
    asked = ActorSettings(dtype="bfloat16", rows="prefix_tree", **settings)
    assert platform.packing_form(asked, cuda) == "packed" and not platform.uses_flex(asked, cuda)
    assert f"actor.rows: packed, not prefix_tree: {reason}" in platform.describe(asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    available = platform.describe(ActorSettings(dtype="bfloat16", rows="prefix_tree"))
    assert "attention: FlexAttention over prefix trees" in available and "not prefix_tree" not in available


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

    cpu._retarget(cast(FunctionType, outer))
    assert outer(torch.zeros(1).half()) == ("cpu", "cpu", True, "cudagraph")


def nothing_to_do() -> str:
    return "cpu"


@pytest.mark.parametrize(
    ("place", "name", "adapt"),
    [
        ("moe_utils.RouterGatingLinearFunction", "forward", cpu.name_general_gemm),
        ("token_dispatcher.MoEAlltoAllTokenDispatcher", "_maybe_dtoh_and_synchronize", cpu._adapt_experts),
    ],
)
def test_a_changed_expert_layer_in_megatron_raises_an_error(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, adapt: Callable[[], None]
) -> None:
    monkeypatch.setattr(f"megatron.core.transformer.moe.{place}.{name}", lambda: None)
    with pytest.raises(RuntimeError, match="megatron-core changed"):
        adapt()


@pytest.mark.parametrize(
    "break_in",
    [
        lambda: cpu._retarget(cast(FunctionType, nothing_to_do)),
        lambda: cpu._replace(cast(FunctionType, nothing_to_do), lambda device: device),
        lambda: cpu._find("utils:no_such_function"),
        lambda: cpu._find("optimizer.optimizer:FP32Optimizer.no_such_method"),
    ],
)
def test_a_changed_function_in_megatron_raises_an_error(break_in: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="megatron-core changed"):
        break_in()
