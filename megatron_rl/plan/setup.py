"""The inputs of a plan: configuration, model architecture, GPU and assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layout_check import check_experts_wanted, validate_layout
from megatron_rl.models.published import known_config
from megatron_rl.parallel.layout import Layout, layout_of, padded_vocabulary
from megatron_rl.parallel.placement import Placement, placement_of
from megatron_rl.plan.assumptions import Assumptions, Lengths, lengths
from megatron_rl.utils.hardware import GPUS, Gpu

USUAL_PROMPT = 200
"""Usual length of a mathematics problem in tokens."""


@dataclass(frozen=True)
class Setup:
    """The inputs of a plan, and quantities that follow from them."""

    config: Config
    hf_config: dict[str, Any]
    model: Architecture
    gpu: Gpu
    assumed: Assumptions

    @classmethod
    def of(cls, config: Config, gpu: Gpu, assumed: Assumptions) -> Setup:
        """Raises UserError if the model cannot be divided as configured, or the cluster is too small."""
        if config.prepare and not config.model.path.is_dir():
            raise UserError(
                f"model.path: {config.model.path} is not there yet: the run itself writes this small model "
                f"and its data (prepare.task: {config.prepare.task}). Start the run; a plan is for models that need one"
            )
        hf_config = known_config(config.model.path)
        limit = config.rollout.max_response_tokens
        if not 0 < assumed.mean_response < limit:
            raise UserError(
                f"mean_response: {assumed.mean_response:g} is not between 0 and rollout.max_response_tokens ({limit})"
            )
        setup = cls(config, hf_config, Architecture.from_hf(hf_config), gpu, assumed)
        setup.check()
        return setup

    def check(self) -> None:
        """Raises UserError if the model cannot be divided as configured, lacks the experts that a kernel is for, or has
        too few positions or token ids for the responses, or if the cluster is too small."""
        validate_layout(self.hf_config, self.layout, self.config.actor.pad_vocabulary)
        check_experts_wanted(self.hf_config, self.config.actor.fusions)
        self._check_response()
        len(self.placement.nodes)

    def _check_response(self) -> None:
        """A prompt of one token must fit before the longest response. A run checks the prompts that it has."""
        limit, positions = self.config.rollout.max_response_tokens, self.config.model.max_positions
        if limit >= (positions or self.model.max_positions):
            raise UserError(
                f"rollout.max_response_tokens: {limit} leaves no room for a prompt: the model is made for "
                f"{positions or self.model.max_positions} positions. Lower it, use a model with rope scaling, or set "
                "model.max_positions to go beyond them"
            )
        if wrong := [token for token in self.config.rollout.stop_token_ids or () if token >= self.model.vocabulary]:
            raise UserError(
                f"rollout.stop_token_ids: {wrong[0]} is no token id of the model, which has {self.model.vocabulary} "
                "(vocab_size in its config.json)"
            )

    @property
    def transformer_engine(self) -> bool:
        """Whether the actor uses Transformer Engine layers rather than Megatron's local ones, as on the CPU."""
        actor = self.config.actor
        return actor.device != "cpu" and actor.dtype != "float32" and self.assumed.transformer_engine

    @property
    def fused_swiglu(self) -> bool:
        """Whether SwiGLU is one kernel, as it is on GPUs unless the configuration turns it off."""
        return self.config.actor.device != "cpu" and self.config.actor.fusions.swiglu is not False

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.config.actor)

    @cached_property
    def placement(self) -> Placement:
        """Raises UserError if the cluster is too small."""
        return placement_of(self.config)

    @property
    def element(self) -> int:
        """Bytes per weight or activation."""
        return 4 if self.config.actor.dtype == "float32" else 2

    @property
    def vocabulary_part(self) -> int:
        """Columns of the LM head on one rank, padding included."""
        return padded_vocabulary(self.model.vocabulary, self.layout.tensor) // self.layout.tensor

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def micro_batch_tokens(self) -> float:
        """Largest number of tokens in a micro-batch on one rank. A longer sequence has a micro-batch of its own."""
        return max(self.config.actor.micro_batch_tokens, self.longest_sequence) / self.layout.context

    @property
    def micro_batch_responses(self) -> float:
        """Largest number of tokens that carry loss in a micro-batch on one rank."""
        sequences = max(1, self.config.actor.micro_batch_tokens // self.longest_sequence)
        prompt_tokens = min(self.config.data.max_prompt_tokens, self.assumed.mean_prompt) * sequences
        return max(0.0, self.micro_batch_tokens * self.layout.context - prompt_tokens) / self.layout.context

    @property
    def sequences(self) -> int:
        """Number of sequences (prompt and response) in a step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @cached_property
    def lengths(self) -> Lengths:
        """Distribution of response lengths."""
        return lengths(self.assumed.mean_response, self.assumed.spread, self.config.rollout.max_response_tokens)

    @property
    def step_tokens(self) -> float:
        """Tokens of prompts and responses in a step."""
        return self.sequences * (self.assumed.mean_prompt + self.lengths.mean())

    @property
    def step_squares(self) -> float:
        """Sum of the squared sequence lengths in a step."""
        return self.sequences * self.lengths.mean(lambda length: (self.assumed.mean_prompt + length) ** 2)

    @property
    def micro_batches(self) -> float:
        """Number of micro-batches of one replica in one update."""
        per_update = self.step_tokens / self.layout.data / self.config.train.updates_per_rollout
        return max(1.0, per_update / max(self.config.actor.micro_batch_tokens, self.step_tokens / self.sequences))


def setup_of(config: Config, **assumed: Any) -> Setup:
    """Returns the setup on the GPUs that the configuration names.

    assumed: values for `Assumptions`. The default for the mean response length is a guess, a third of the limit. Raises
    UserError if the model cannot be divided as configured, or the cluster is too small.
    """
    lengths = {
        "mean_prompt": min(USUAL_PROMPT, config.data.max_prompt_tokens / 2),
        "mean_response": config.rollout.max_response_tokens / 3,
    }
    return Setup.of(config, GPUS[config.cluster.gpu], Assumptions(**lengths | assumed))
