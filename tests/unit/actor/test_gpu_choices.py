"""What is chosen on a GPU: fused kernels, attention, environment variables. None of this has run on a GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import nn

from megatron_rl.actor import platform
from megatron_rl.actor.platform import environment, gpu
from megatron_rl.config.actor import ActorSettings, AttentionBackend, FusionSettings
from megatron_rl.errors import UserError
from megatron_rl.utils import versions

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NAMES = gpu.Fusions.__slots__


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("triton")
def test_every_fused_kernel_is_on_where_it_exists_and_off_by_its_key() -> None:
    automatic = FusionSettings()
    assert gpu.fusions(automatic, CUDA, engine=True, experts=True) == gpu.Fusions(*[True] * len(NAMES))
    assert not gpu.fusions(automatic, CUDA, engine=True, experts=False).expert_permutation
    assert gpu.fusions(automatic, CUDA, engine=False, experts=True) == gpu.Fusions(swiglu=True)
    assert gpu.fusions(automatic, CPU, engine=False, experts=True) == gpu.NO_FUSIONS
    off = FusionSettings(**dict.fromkeys(NAMES, False))
    assert gpu.fusions(off, CUDA, engine=True, experts=True) == gpu.NO_FUSIONS


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_kernel_that_is_asked_for_and_missing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"actor\.fusions\.{name}: true needs .*Set it to auto or false"):
        gpu.fusions(FusionSettings(**{name: True}), CPU, engine=False, experts=False)


def test_gradient_accumulation_is_set_in_the_layers_that_know_it() -> None:
    """The LM head is none of them: megatron-core would ask it for Apex."""
    layer, head = nn.Linear(2, 2), nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    gpu.fuse_gradient_accumulation(nn.ModuleList([layer, head]))
    assert layer.fuse_wgrad_accumulation is True and not hasattr(head, "fuse_wgrad_accumulation")
    with pytest.raises(RuntimeError, match="Transformer Engine changed"):
        gpu.fuse_gradient_accumulation(head)


def test_attention_suits_the_layers() -> None:
    for backend in ("auto", "flash", "fused", "unfused"):
        gpu.check_attention(backend, engine=True, environment={})
    for backend in ("auto", "local"):
        gpu.check_attention(backend, engine=False, environment={})
    with pytest.raises(UserError, match="local means attention without Transformer Engine"):
        gpu.check_attention("local", engine=True, environment={})
    with pytest.raises(UserError, match="flash chooses among the attentions of Transformer Engine"):
        gpu.check_attention("flash", engine=False, environment={})


def test_attention_that_must_repeat_its_bits_is_flash_attention_where_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(flash: str | None, backend: AttentionBackend = "auto", **settings: bool) -> str:
        monkeypatch.setattr(versions, "installed", lambda name: flash if name == "flash-attn" else None)
        return gpu.attention(backend, **({"engine": True, "deterministic": True} | settings))

    assert chosen("2.7.4.post1") == "flash"
    assert chosen("2.4.0") == chosen(None) == "auto"
    assert chosen("2.8.0", deterministic=False) == chosen("2.8.0", engine=False) == "auto"
    assert chosen("2.8.0", backend="fused") == "fused", "a key that is set stays"
    warned = gpu.deterministic_lines(True, "auto", engine=True)
    assert len(warned) == 2 and "flash-attn>=2.4.1" in warned[1] and "length^2" in warned[1]
    assert len(gpu.deterministic_lines(True, "flash", engine=True)) == 1
    assert gpu.deterministic_lines(False, "auto", engine=True) == []


def test_attention_variables_that_contradict_the_key_are_named() -> None:
    gpu.check_attention("flash", engine=True, environment={"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"})
    with pytest.raises(UserError, match=r"NVTE_FLASH_ATTN=0 is set.*attention_backend: auto needs 1.*Unset"):
        gpu.check_attention("auto", engine=True, environment={"NVTE_FLASH_ATTN": "0"})


@pytest.mark.parametrize("backend", gpu.ATTENTION)
def test_the_expected_attention_variables_are_those_of_megatron(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from types import SimpleNamespace

    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    for name in gpu.ATTENTION_VARIABLES:
        monkeypatch.setenv(name, "")  # so that the value is restored after the test
        monkeypatch.delenv(name)
    model = SimpleNamespace(
        config=SimpleNamespace(attention_backend=AttnBackend[backend], flash_attention_version=None)
    )
    LanguageModule._set_attention_backend(model)
    assert "".join(os.environ[name] for name in gpu.ATTENTION_VARIABLES) == gpu.ATTENTION[backend]


def test_the_environment_follows_layout_and_precision() -> None:
    plain = environment.rank_environment(ActorSettings(), {})
    assert plain["NCCL_CUMEM_ENABLE"] == plain["NCCL_NVLS_ENABLE"] == plain["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
    assert plain["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not {"CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "NCCL_ALGO"} & set(plain)
    for settings in ({"tensor_parallel": 2}, {"context_parallel": 2}):
        assert environment.rank_environment(ActorSettings(**settings), {})["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    fp8 = environment.rank_environment(ActorSettings(fp8="blockwise"), {})
    assert fp8["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "1"
    repeated = environment.rank_environment(ActorSettings(deterministic=True), {})
    assert (repeated["NCCL_ALGO"], repeated["NVTE_ALLOW_NONDETERMINISTIC_ALGO"]) == ("Ring", "0")


def test_the_users_own_variables_stay_and_are_said_to_be_theirs() -> None:
    own = {
        "NCCL_NVLS_ENABLE": "1",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    }
    chosen = environment.rank_environment(ActorSettings(), own)
    assert chosen["NCCL_NVLS_ENABLE"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in chosen and chosen["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    assert chosen["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"  # NVIDIA's container sets 1, not the user
    line = environment.describe(chosen, own)
    assert "\n" not in line and "NCCL_NVLS_ENABLE=1 (yours)" in line and "NCCL_CUMEM_ENABLE=0," in line


@pytest.mark.usefixtures("triton")
def test_the_log_has_one_line_per_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_device", CUDA)
    settings: dict[str, Any] = {"dtype": "bfloat16", "data_parallel": 2, "deterministic": True}
    lines = platform.describe(ActorSettings(**settings), experts=True).splitlines()
    assert [line.strip() for line in lines if "fusions" in line] == [f"actor.fusions.{name}: on" for name in NAMES]
    assert any("attention: auto" in line for line in lines)
    assert any("overlaps the backward pass: on" in line for line in lines)
    assert any("deterministic" in line for line in lines)


def test_the_sum_of_gradients_overlaps_only_with_replicas_and_by_default_only_on_gpus() -> None:
    alone, two = ActorSettings(overlap_grad_reduce=True), {"data_parallel": 2}
    assert not platform.overlaps_grad_reduce(alone, CUDA)
    assert platform.overlaps_grad_reduce(ActorSettings(**two), CUDA)
    assert not platform.overlaps_grad_reduce(ActorSettings(**two), CPU)
    assert platform.overlaps_grad_reduce(ActorSettings(**two, overlap_grad_reduce=True), CPU)
