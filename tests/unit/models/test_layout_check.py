from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from megatron_rl.config.actor import FusionSettings
from megatron_rl.errors import UserError
from megatron_rl.models.layout_check import check_experts_wanted, validate_layout
from megatron_rl.parallel.layout import Layout


def qwen3(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 1024,
        "vocab_size": 1001,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    } | changes


EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=8, pipeline=12, data=5), Layout(tensor=2, pipeline=3)])
def test_layouts_that_fit_the_model_are_accepted(layout: Layout) -> None:
    validate_layout(qwen3(), layout, pad_vocabulary=True)


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({}, Layout(tensor=3), ["actor.tensor_parallel is 3", "attention heads (16)", "that work: 2, 4."]),
        ({}, Layout(tensor=16), ["key/value heads (8)", "that work: 8."]),
        ({"intermediate_size": 1028}, Layout(tensor=8), ["feed-forward size (1028)", "that work: 4."]),
        ({}, Layout(pipeline=13), ["actor.pipeline_parallel is 13", "only 12 layers"]),
        ({}, Layout(context=0), ["actor.context_parallel is 0"]),
        ({}, Layout(virtual_pipeline=2), ["actor.virtual_pipeline is 2", "actor.pipeline_parallel is 1"]),
        ({}, Layout(pipeline=2, virtual_pipeline=4), ["virtual_pipeline = 8", "12 layers", "that work: 3, 6."]),
        ({}, Layout(sequence_parallel=True), ["actor.sequence_parallel", "actor.tensor_parallel is 1"]),
        ({}, Layout(expert=4), ["actor.expert_parallel is 4", "dense"]),
        ({}, Layout(data=0), ["actor.data_parallel is 0"]),
        ({"architectures": ["GemmaForCausalLM"]}, Layout(), ["GemmaForCausalLM", "Qwen3ForCausalLM, Qwen3Moe"]),
        ({"architectures": None, "model_type": "gemma"}, Layout(), ["gemma", "Supported"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, Layout(), ["rope scaling 'dynamic'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, Layout(), ["factor: 0.5"]),
        ({"use_sliding_window": True}, Layout(), ["sliding-window"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, Layout(), ["layer_types", "sliding_attention"]),
        ({"mlp_bias": True}, Layout(), ["mlp_bias"]),
        (EXPERTS, Layout(tensor=2), ["actor.tensor_parallel is 2", "Set actor.sequence_parallel to true"]),
        (EXPERTS | {"moe_intermediate_size": 97}, Layout(tensor=2, sequence_parallel=True), ["experts' feed-forward"]),
        (EXPERTS, Layout(data=4, expert=4), ["actor.expert_parallel is 4", "experts (6)", "that work: 2."]),
        (
            EXPERTS,
            Layout(data=4, expert=3),
            ["actor.expert_parallel is 3", "ranks of a pipeline stage (4)", "work: 2."],
        ),
        (EXPERTS | {"num_experts_per_tok": 1}, Layout(), ["num_experts_per_tok: 1"]),
    ],
)
def test_refusals_name_the_wrong_value_and_the_remedy(
    changes: dict[str, Any], layout: Layout, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        validate_layout(qwen3(**changes), layout, pad_vocabulary=True)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(pipeline=2, data=4, expert=2),
        Layout(data=6, expert=3),
        Layout(tensor=2, expert=2, sequence_parallel=True),
    ],
)
def test_layouts_that_fit_a_model_with_experts_are_accepted(layout: Layout) -> None:
    validate_layout(qwen3(**EXPERTS), layout, pad_vocabulary=True)


def test_tensor_parallel_must_divide_the_vocabulary_unless_it_is_padded() -> None:
    validate_layout(qwen3(), Layout(tensor=2), pad_vocabulary=True)
    for vocabulary in (1001, 1002):
        with pytest.raises(UserError, match=rf"{vocabulary}\s+tokens.*pad_vocabulary.*that work: 1\."):
            validate_layout(qwen3(vocab_size=vocabulary), Layout(tensor=2), pad_vocabulary=False)
    validate_layout(qwen3(vocab_size=1024), Layout(tensor=2), pad_vocabulary=False)


def test_a_missing_config_key_is_named() -> None:
    config = qwen3()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="lacks 'intermediate_size'"):
        validate_layout(config, Layout(), pad_vocabulary=True)


def test_a_kernel_of_experts_needs_experts() -> None:
    wanted = FusionSettings(expert_permutation=True)
    check_experts_wanted(qwen3(**EXPERTS), wanted)
    with pytest.raises(UserError, match=r"expert_permutation: true needs a model with experts.*auto or false"):
        check_experts_wanted(qwen3(), wanted)


def test_model_type_is_used_if_architectures_is_absent() -> None:
    validate_layout(qwen3(architectures=None, model_type="qwen3"), Layout(), pad_vocabulary=True)


def test_the_layout_check_does_not_import_torch() -> None:
    imports = "import sys, megatron_rl.models.layout_check"
    code = f"{imports}; print({{'torch', 'megatron'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
