"""Operations of a forward pass, against the count of torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.flops import body_flops, pass_flops
from tests.hf_models import config_json, hf_model


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_pass_flops_match_the_count_of_torch(model_type: str) -> None:
    """torch counts full squares in attention, of which the causal mask uses half."""
    lengths = [9, 24]
    architecture = Architecture.from_hf(config_json(model_type, num_key_value_heads=4))
    model = hf_model(model_type, num_key_value_heads=4, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.zeros(1, length - 1, dtype=torch.int64))
    masked = body_flops(architecture, 0, sum((length - 1) ** 2 for length in lengths))
    response_tokens = sum(lengths) - len(lengths)  # the first token of each sequence is its prompt
    assert counter.get_total_flops() == pass_flops(architecture, lengths, response_tokens) + masked
