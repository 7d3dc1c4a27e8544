"""Rotary embeddings scaled for long contexts: linear, llama3, yarn.

Megatron's own settings cover only llama3 with its published constants, so the frequencies come from transformers, the
reference implementation of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ScaledRope:
    """Frequencies and attention factor of scaled rotary embeddings."""

    inv_freq: Tensor
    """Frequencies, [head_dim / 2]."""
    factor: float
    """Factor on queries and on keys; 1 except for yarn."""

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], rope_type: str) -> ScaledRope:
        """Computes the frequencies and the factor of a model's config.json."""
        from transformers import AutoConfig  # most models need it not, and it takes a second to import
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.for_model(**hf_config)
        return cls(*ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu"))

    def scale_attention(self, config: TransformerConfig) -> None:
        """Applies the factor on queries and keys to the scale of their product. Call before building the model."""
        if self.factor != 1.0:
            config.softmax_scale = self.factor**2 / math.sqrt(config.kv_channels)

    def set_frequencies(self, model: GPTModel) -> None:
        """Sets the frequencies of a built model."""
        model.rotary_pos_emb.inv_freq = self.inv_freq.to(model.rotary_pos_emb.inv_freq)
