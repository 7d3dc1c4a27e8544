"""Prompts in, samples out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_rl.types import Generation, Prompt, Sample, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generates(Protocol):
    """One engine or many."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Generation]]: ...


def collect(
    engines: Generates,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_group: int = 0,
) -> list[Sample]:
    """`sampling.n` samples a prompt, group after group, numbered from first_group. Raises when an engine answers with
    fewer."""
    groups = engines.generate(prompts, sampling)
    samples = []
    for group, (prompt, generations) in enumerate(zip(prompts, groups, strict=True), start=first_group):
        if len(generations) != sampling.n:
            raise RuntimeError(
                f"prompt {prompt.id}: {len(generations)} responses came back, {sampling.n} were asked for"
            )
        for generation in generations:
            text = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
            samples.append(Sample(prompt=prompt, group=group, generation=generation, text=text))
    return samples
