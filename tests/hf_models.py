"""Builds the Hugging Face models that the tests use, small enough to check token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

MODEL_TYPES = ("qwen3", "qwen2", "llama", "qwen3_moe")

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def hf_config(model_type: str = "qwen3", **changes: Any) -> PretrainedConfig:
    """Returns the config of a tiny model, with `changes` applied."""
    return AutoConfig.for_model(model_type, **(SHAPE | FAMILY_SETTINGS.get(model_type, {}) | changes))


def config_json(model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """Returns the content of the model's config.json."""
    config = hf_config(model_type, **changes)
    with torch.device("meta"):
        return config.to_dict() | {"architectures": [type(AutoModelForCausalLM.from_config(config)).__name__]}


def hf_model(model_type: str = "qwen3", *, seed: int = 0, noise: float = 0.0, **changes: Any) -> PreTrainedModel:
    """Returns a model in fp32 with weights drawn from `seed`.

    `noise` is the scale of noise added to all weights: norm weights of one and biases of zero would hide mistakes.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def write_hf_model(folder: Path, model_type: str = "qwen3", **settings: Any) -> Path:
    """Writes `hf_model` to a folder. Returns the folder."""
    hf_model(model_type, **settings).save_pretrained(folder)
    return folder
