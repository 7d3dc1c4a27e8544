"""What a plan is made from: a configuration, the model's shape, the GPU and the assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config
from megatron_rl.models.layout_check import validate_layout
from megatron_rl.parallel.layout import Layout, layout_of, padded_vocabulary
from megatron_rl.parallel.placement import Placement, placement_of
from megatron_rl.plan.hardware import GPUS, Assumptions, Gpu
from megatron_rl.plan.lengths import Lengths, lengths

USUAL_PROMPT = 200
"""Tokens; problems of mathematics are about that long."""


@dataclass(frozen=True)
class Setup:
    """Everything that the parts of a plan ask for."""

    config: Config
    hf_config: dict[str, Any]
    model: Architecture
    gpu: Gpu
    assumed: Assumptions

    @classmethod
    def of(cls, config: Config, gpu: Gpu, assumed: Assumptions) -> Setup:
        """Raises UserError where the model cannot be spread as asked."""
        hf_config = read_config(config.model.path)
        limit = config.rollout.max_response_tokens
        if not 0 < assumed.mean_response < limit:
            raise UserError(
                f"mean_response: {assumed.mean_response:g} is not between 0 and the limit of {limit} tokens"
            )
        setup = cls(config, hf_config, Architecture.from_hf(hf_config), gpu, assumed)
        setup.check()
        return setup

    def check(self) -> None:
        """Raises UserError where the model cannot be spread as asked, or the cluster is too small."""
        validate_layout(self.hf_config, self.layout, self.config.actor.pad_vocabulary)
        len(self.placement.nodes)

    @property
    def transformer_engine(self) -> bool:
        """Whether the actor's layers are Transformer Engine's; else they are Megatron's local ones, as on CPU."""
        actor = self.config.actor
        return actor.device != "cpu" and actor.dtype != "float32" and self.assumed.transformer_engine

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.config.actor)

    @cached_property
    def placement(self) -> Placement:
        """Raises UserError where the cluster is too small."""
        return placement_of(self.config)

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.config.actor.dtype == "float32" else 2

    @property
    def vocabulary_part(self) -> int:
        """Columns of the LM head on one rank, padding included."""
        return padded_vocabulary(self.model.vocabulary, self.layout.tensor) // self.layout.tensor

    @property
    def longest_row(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def micro_batch_tokens(self) -> float:
        """The most tokens of a micro-batch on one rank: a longer row goes alone."""
        return max(self.config.actor.micro_batch_tokens, self.longest_row) / self.layout.context

    @property
    def micro_batch_responses(self) -> float:
        """The most tokens of it that carry loss."""
        whole_rows = max(1, self.config.actor.micro_batch_tokens // self.longest_row)
        with_prompts = min(self.config.data.max_prompt_tokens, self.assumed.mean_prompt) * whole_rows
        return max(0.0, self.micro_batch_tokens * self.layout.context - with_prompts) / self.layout.context

    @property
    def rows(self) -> int:
        """Responses of a step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @cached_property
    def lengths(self) -> Lengths:
        """Of the responses."""
        return lengths(self.assumed.mean_response, self.assumed.spread, self.config.rollout.max_response_tokens)

    @property
    def step_tokens(self) -> float:
        """Prompts and responses."""
        return self.rows * (self.assumed.mean_prompt + self.lengths.mean())

    @property
    def step_squares(self) -> float:
        """Sum of the squared lengths of a step's rows."""
        return self.rows * self.lengths.mean(lambda length: (self.assumed.mean_prompt + length) ** 2)

    @property
    def micro_batches(self) -> float:
        """Of one replica in one update."""
        per_update = self.step_tokens / self.layout.data / self.config.train.updates_per_rollout
        return max(1.0, per_update / max(self.config.actor.micro_batch_tokens, self.step_tokens / self.rows))


def setup_of(config: Config, **assumed: Any) -> Setup:
    """On the GPUs that the configuration names. Of lengths that are not given, a guess: a third of the longest
    response. Raises UserError as `Setup.of` does."""
    lengths = {
        "mean_prompt": min(USUAL_PROMPT, config.data.max_prompt_tokens / 2),
        "mean_response": config.rollout.max_response_tokens / 3,
    }
    return Setup.of(config, GPUS[config.cluster.gpu], Assumptions(**lengths | assumed))
