"""Limits of a model that every prompt is held to: its vocabulary and its positions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.types import Prompt


@dataclass(frozen=True, slots=True)
class Limits:
    """What the prompts of one file must fit into."""

    vocabulary: int
    """Number of the model's token ids."""
    positions: int
    """Longest sequence, in tokens."""
    response_tokens: int
    """Longest response, in tokens."""
    response_key: str
    """Configuration key of the longest response, for messages."""
    prompt_key: str = "data.max_prompt_tokens"
    """Key of the longest prompt."""
    positions_key: str = "model.max_positions"
    """Key that sets another number of positions."""

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt with a token that the model does not have, or without room for a response."""
        largest, length = max(prompt.token_ids), len(prompt.token_ids)
        if largest >= self.vocabulary:
            raise ValueError(
                f"the prompt has the token id {largest}, but the model has {self.vocabulary} token ids (vocab_size in "
                "its config.json): the tokenizer has tokens that the model lacks"
            )
        if length + self.response_tokens > self.positions:
            raise ValueError(
                f"the prompt has {length} tokens, and with {self.response_key}: {self.response_tokens} the sequence "
                f"may have {length + self.response_tokens}, but the model is made for {self.positions} positions. "
                f"Lower {self.response_key} or {self.prompt_key}, use a model with rope scaling, or set "
                f"{self.positions_key}: {length + self.response_tokens} to go beyond them"
            )
