"""The `config.json` of published models, as far as a plan needs it, so that a run can be planned before the model is
there.

The sizes are those of the models' own config.json. A test compares the numbers of parameters with the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import read_config

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
}
_QWEN2_SMALL = _QWEN2 | {"vocab_size": 151_936, "max_position_embeddings": 32_768}


def _model(
    family: dict[str, Any], layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, tied: bool, **more: Any
) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tied,
    }
    return family | sizes | more


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _model(_QWEN3, 28, 1024, 16, 8, 3072, tied=True),
    "Qwen3-1.7B": _model(_QWEN3, 28, 2048, 16, 8, 6144, tied=True),
    "Qwen3-4B": _model(_QWEN3, 36, 2560, 32, 8, 9728, tied=True),
    "Qwen3-8B": _model(_QWEN3, 36, 4096, 32, 8, 12_288, tied=False),
    "Qwen3-14B": _model(_QWEN3, 40, 5120, 40, 8, 17_408, tied=False),
    "Qwen3-32B": _model(_QWEN3, 64, 5120, 64, 8, 25_600, tied=False),
    "Qwen3-30B-A3B": _model(_QWEN3_MOE, 48, 2048, 32, 4, 6144, tied=False, moe_intermediate_size=768),
    "Qwen3-235B-A22B": _model(_QWEN3_MOE, 94, 4096, 64, 4, 12_288, tied=False, moe_intermediate_size=1536),
    "Qwen2.5-0.5B": _model(_QWEN2_SMALL, 24, 896, 14, 2, 4864, tied=True),
    "Qwen2.5-1.5B": _model(_QWEN2_SMALL, 28, 1536, 12, 2, 8960, tied=True),
    "Qwen2.5-3B": _model(_QWEN2_SMALL, 36, 2048, 16, 2, 11_008, tied=True),
    "Qwen2.5-7B": _model(_QWEN2, 28, 3584, 28, 4, 18_944, tied=False),
    "Qwen2.5-14B": _model(_QWEN2, 48, 5120, 40, 8, 13_824, tied=False, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _model(_QWEN2, 64, 5120, 40, 8, 27_648, tied=False, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _model(_QWEN2, 80, 8192, 64, 8, 29_568, tied=False, rms_norm_eps=1e-5),
}
"""Name -> config. A base model (`-Base`) and one for chats (`-Instruct`) have the sizes of the model of the name."""


def known_config(model: Path) -> dict[str, Any]:
    """Returns the config of a model folder, or of the published model that `model` is named after.

    `model` may be a path where the model is going to be, or an id of the Hugging Face Hub. Raises UserError if the
    model is neither there nor known.
    """
    if model.is_dir():
        return read_config(model)
    if (config := PUBLISHED.get(published_name(model))) is not None:
        return config
    raise UserError(
        f"model.path: {model} is no folder here, and no model whose sizes are known. Give a Hugging Face folder with "
        f"config.json, or one of {', '.join(PUBLISHED)}"
    )


def published_name(model: Path) -> str:
    """Returns the name of the sizes that a model would have: `Qwen3-14B` for `models/Qwen3-14B-Base`."""
    return model.name.partition("@")[0].removesuffix("-Base").removesuffix("-Instruct")
