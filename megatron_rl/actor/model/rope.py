"""Rotary embeddings that are scaled for long contexts: linear, llama3, yarn.

Megatron's own settings cover llama3 with its published constants only, so the frequencies come from transformers, which
the model was made with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True, slots=True)
class ScaledRope:
    inv_freq: Tensor
    """[head_dim / 2]"""
    factor: float
    """On queries and on keys; yarn's is not 1."""

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], rope_type: str) -> ScaledRope:
        config = AutoConfig.for_model(**hf_config)
        return cls(*ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu"))

    def scale_attention(self, config: TransformerConfig) -> None:
        """Before the model is built: the factor on queries times that on keys, on their product."""
        if self.factor != 1.0:
            config.softmax_scale = self.factor**2 / math.sqrt(config.kv_channels)

    def set_frequencies(self, model: GPTModel) -> None:
        """After it is built."""
        model.rotary_pos_emb.inv_freq = self.inv_freq.to(model.rotary_pos_emb.inv_freq)
