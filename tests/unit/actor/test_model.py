"""The modules that plug into Megatron, and the properties of a built stage that its optimizer relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_rl.actor.model.attention import SDPAttention
from megatron_rl.actor.model.layers import RMSNorm
from megatron_rl.actor.model.policy import build_model, mark_shards
from megatron_rl.actor.optimizer.distributed import wrap_ddp
from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel.layout import Layout
from tests.hf_models import config_json
from tests.meeting import only_rank

CPU = torch.device("cpu")
CONFIG = config_json("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    with only_rank():
        yield


def config(**changes: Any) -> TransformerConfig:
    settings = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}
    return TransformerConfig(**(settings | changes))


def stage(dtype: torch.dtype = torch.float32) -> GPTModel:
    model = build_model(CONFIG, layout=Layout(), dtype=dtype, device=CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def test_packed_sequences_do_not_attend_to_each_other() -> None:
    model, lengths = stage(), (5, 3, 9)
    tokens = torch.randint(0, 50, (sum(lengths),))
    bounds = torch.tensor([0, 5, 8, 17], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=9, max_seqlen_kv=9
    )
    packed_logits = model(tokens[None], None, None, packed_seq_params=packed)[0]
    separate_logits = torch.cat([model(part[None], None, None)[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(packed_logits, separate_logits, atol=1e-5, rtol=1e-5)


def test_padding_on_the_right_does_not_change_earlier_logits() -> None:
    model = stage()
    tokens = torch.randint(0, 50, (2, 12))
    full, shortened = model(tokens, None, None), model(tokens[:, :7], None, None)
    torch.testing.assert_close(full[:, :7], shortened, atol=1e-5, rtol=1e-5)


def test_attention_refuses_dropout_and_masks() -> None:
    with pytest.raises(ValueError, match="dropout"):
        SDPAttention(config(attention_dropout=0.1), layer_number=1)
    query = torch.zeros(3, 1, 4, 8)
    with pytest.raises(ValueError, match="no mask"):
        SDPAttention(config(), layer_number=1)(query, query, query, torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_norm_weights_carry_the_sequence_parallel_mark() -> None:
    settings = config(sequence_parallel=True, tensor_model_parallel_size=2, params_dtype=torch.bfloat16)
    norm = RMSNorm(settings, hidden_size=32, eps=1e-6)
    assert getattr(norm.weight, "sequence_parallel", None) is True
    assert norm.weight.dtype == torch.bfloat16


def test_all_parameters_of_a_stage_have_one_dtype() -> None:
    assert {parameter.dtype for parameter in stage(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_matrices_are_marked_as_shards_and_norms_are_not() -> None:
    marks = {name: getattr(p, "tensor_model_parallel", False) for name, p in stage().named_parameters()}
    assert {name for name, sharded in marks.items() if not sharded} == {name for name in marks if "norm" in name}


def grouped_experts() -> GPTModel:
    """A stand-in for a layer of Transformer Engine's grouped experts: all weights of a rank's experts in one module."""
    model, layer, mlp, experts = (nn.Module() for _ in range(4))
    for name in ("linear_fc1", "linear_fc2"):
        linear = nn.Module()
        for expert in range(2):
            linear.register_parameter(f"weight{expert}", nn.Parameter(torch.zeros(2, 2)))
        experts.register_module(name, linear)
    mlp.router = nn.Linear(2, 4, bias=False)
    mlp.router.weight.tensor_model_parallel = True  # a mark that is wrong
    mlp.experts, layer.mlp, layer.layer_number = experts, mlp, 1  # type: ignore[assignment]
    decoder: Any = nn.Module()
    decoder.layers = nn.ModuleList([layer])
    model.decoder = decoder
    return model  # type: ignore[return-value]


def test_grouped_experts_are_marked_as_shards_whatever_marked_them_before() -> None:
    model = grouped_experts()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    mark_shards(model, Architecture.from_hf(config_json("qwen3_moe", **experts)))
    marks: dict[str, Any] = {name.removeprefix("decoder.layers.0.mlp."): p for name, p in model.named_parameters()}
    assert {name: (p.tensor_model_parallel, p.partition_dim) for name, p in marks.items()} == {
        "experts.linear_fc1.weight0": (True, 0),
        "experts.linear_fc1.weight1": (True, 0),
        "experts.linear_fc2.weight0": (True, 1),
        "experts.linear_fc2.weight1": (True, 1),
        "router.weight": (False, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_steps_equal_those_of_torch_adamw(dtype: torch.dtype) -> None:
    """Compares Megatron's optimizer and clipping on CPU with torch: clipped gradients, AdamW on fp32 main weights."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = stage(dtype)
    wrapped = wrap_ddp(model)
    settings = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.0, clip_grad=0.5, bf16=dtype == torch.bfloat16, params_dtype=dtype
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    expected = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    reference = torch.optim.AdamW(expected.values(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        wrapped.zero_grad_buffer()
        wrapped(torch.randint(0, 50, (2, 6)), None, None).float().square().mean().backward()
        for name, gradient in ((name, p.main_grad) for name, p in model.named_parameters()):
            expected[name].grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(expected.values(), 0.5)
        reference.step()
        _, reported, _ = optimizer.step()
        assert float(reported) == pytest.approx(norm.item(), rel=1e-5), step
    main = {name: getattr(p, "main_param", p).detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(main, {name: p.detach() for name, p in expected.items()}, atol=1e-6, rtol=1e-5)


def test_ddp_refuses_a_model_that_would_divide_its_gradients() -> None:
    model = stage()
    model.config.calculate_per_token_loss = False
    with pytest.raises(ValueError, match="calculate_per_token_loss"):
        wrap_ddp(model)
