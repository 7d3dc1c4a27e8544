"""Hugging Face models small enough to check token by token: one maker for every test that needs one."""

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
PARTICULAR: dict[str, dict[str, Any]] = {
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
    """Tiny, but for what `changes` says."""
    return AutoConfig.for_model(model_type, **(SHAPE | PARTICULAR.get(model_type, {}) | changes))


def config_json(model_type: str = "qwen3", **changes: Any) -> dict[str, Any]:
    """What the model's config.json holds."""
    config = hf_config(model_type, **changes)
    with torch.device("meta"):
        return config.to_dict() | {"architectures": [type(AutoModelForCausalLM.from_config(config)).__name__]}


def hf_model(model_type: str = "qwen3", *, seed: int = 0, noise: float = 0.0, **changes: Any) -> PreTrainedModel:
    """In fp32, with weights of its seed. `noise` is added to all of them: norms of one and biases of nought would hide
    mistakes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def write_hf_model(folder: Path, model_type: str = "qwen3", **settings: Any) -> Path:
    """`hf_model` as a folder."""
    hf_model(model_type, **settings).save_pretrained(folder)
    return folder
