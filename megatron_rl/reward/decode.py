"""Decoding of responses in the grader's workers, which need not import transformers for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.types import Decode, Ids, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Decoder:
    """Decodes with a `tokenizers.Tokenizer`, or with a whole transformers tokenizer. Both can be pickled."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, token_ids: Sequence[int] | Ids) -> str:
        return str(self.tokenizer.decode(np.asarray(token_ids).tolist(), skip_special_tokens=True))


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Returns a function that decodes as the tokenizer does, without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The backend alone does not know the clean-up of spaces, which old tokenizers ask for.
    plain = backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False)
    return _Decoder(backend if plain else tokenizer)


def text_of(sample: Sample, decode: Decode | None) -> str:
    """Returns the text of the sample's response; `decode` None: the sample has its text already.

    Raises ValueError if the token ids cannot be decoded.
    """
    if decode is None:
        return sample.text
    try:
        return decode(sample.response.graded_token_ids)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the response cannot be decoded: {type(error).__name__}: {error}") from error
