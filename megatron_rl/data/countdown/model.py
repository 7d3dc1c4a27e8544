"""The 95-word tokenizer and the untrained 0.6M-parameter Qwen3, as ordinary Hugging Face files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.data.countdown.problems import LARGEST, OPERATORS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = (
    *(PAD, BOS, EOS, ">", ":", *OPERATORS, "=", "ok", "no", "wait", "hmm", "so"),
    *(str(number) for number in range(LARGEST + 1)),
)
CALCULATOR = "calc"
"""Stands in the place of `=` where a calculator shall write the result. Only the calculator task has this word."""
MAX_POSITIONS = 64


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per word, words separated by spaces.

    A word outside the vocabulary raises an error; it never becomes an unknown token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_model(seed: int, vocabulary: Sequence[str] = VOCABULARY) -> Qwen3ForCausalLM:
    """Builds a float32 model with weights drawn from the seed.

    Embeddings are N(0, 0.02) and linear layers N(0, 1/sqrt(fan_in)), with half that standard deviation in the layers
    whose output is added to the residual stream. The caller's random state does not change.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    pad, bos, eos = (vocabulary.index(word) for word in (PAD, BOS, EOS))
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            joins_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            fan_in = parameter.shape[1]
            std = 0.02 if "embed_tokens" in name else (0.5 if joins_residual else 1.0) / math.sqrt(fan_in)
            torch.nn.init.normal_(parameter, 0.0, std, generator=generator)
    model.generation_config = GenerationConfig(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return model


def write_model(folder: Path, seed: int, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """Writes configuration, weights, generation configuration and tokenizer."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    # A progress bar for one file of 2 MB is noise.
    logging.disable_progress_bar()
    try:
        build_model(seed, vocabulary).save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    build_tokenizer(vocabulary).save_pretrained(folder)
