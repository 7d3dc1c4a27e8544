"""Transformer Engine runs on this machine: one layer of each kind that the actor uses, forward and backward."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]


def test_a_linear_layer_with_its_norm_equals_plain_arithmetic() -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.LayerNormLinear(256, 512, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16)
    inputs = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plain = inputs.detach().float().requires_grad_()
    layer(inputs).sum().backward()
    weights = {name: value.detach().float() for name, value in layer.named_parameters()}
    normed = torch.nn.functional.rms_norm(plain, (256,), weights["layer_norm_weight"], layer.eps)
    (normed @ weights["weight"].T).sum().backward()
    assert inputs.grad is not None and plain.grad is not None
    difference = (inputs.grad.float() - plain.grad).abs().max()
    assert difference < 2e-2 * plain.grad.abs().max()


def test_grouped_linear_layers_equal_one_layer_per_expert() -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.GroupedLinear(4, 128, 256, bias=False, params_dtype=torch.bfloat16)
    inputs, sizes = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16), [16, 0, 40, 8]
    output = layer(inputs, sizes).float()
    expected = torch.cat(
        [part.float() @ getattr(layer, f"weight{i}").float().T for i, part in enumerate(inputs.split(sizes))]
    )
    assert (output - expected).abs().max() < 2e-2 * expected.abs().max()
