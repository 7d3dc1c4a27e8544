"""With scaled rotary embeddings the logits equal those of transformers, far beyond the original context length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_rl.actor.model.policy import build_model
from megatron_rl.models.weight_map import load_hf_weights
from megatron_rl.parallel.layout import Layout
from tests.hf_models import config_json, hf_model
from tests.meeting import only_rank

CPU = torch.device("cpu")
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, its attention factor given": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 0.5,
    },
}


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    with only_rank():
        yield


def logits(config: dict[str, Any], weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = build_model(config, layout=Layout(), dtype=torch.float32, device=CPU)
    load_hf_weights(model, config, weights)
    with torch.inference_mode():
        return model(tokens, None, None)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_those_of_transformers(model_type: str, name: str) -> None:
    rope = {"rope_type": name.split(",")[0], "rope_theta": 1e4, **ROPES[name]}
    changes = {"rope_parameters": rope, "initializer_range": 0.3}
    reference = hf_model(model_type, **changes)
    tokens = torch.randint(0, 50, (1, 100))
    with torch.inference_mode():
        expected = reference(tokens).logits
    weights = {key: value.detach() for key, value in reference.named_parameters()}
    found = logits(config_json(model_type, **changes), weights, tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    if name != "default":  # the scaling must matter here, or the test would not notice its absence
        plain = config_json(
            model_type, initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
        assert (logits(plain, weights, tokens) - expected).abs().max() > 1e-2


def test_rope_scaling_of_older_config_files_is_read() -> None:
    """Before transformers 5, `rope_theta` was beside `rope_scaling`, whose type may be called `type`."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, **ROPES["yarn"]}
    reference = hf_model("qwen2", rope_parameters=rope, initializer_range=0.3)
    config = config_json("qwen2")
    del config["rope_parameters"]
    config |= {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **ROPES["yarn"]}}
    tokens = torch.randint(0, 50, (1, 100))
    weights = {key: value.detach() for key, value in reference.named_parameters()}
    with torch.inference_mode():
        torch.testing.assert_close(logits(config, weights, tokens), reference(tokens).logits, atol=1e-4, rtol=1e-5)
