"""Sampling parameters of a run's steps and evaluations. They depend only on seed, step and draw, so that a resumed run
draws what the uninterrupted run would have drawn."""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.config.evaluation import SuiteSettings
from megatron_rl.types import SamplingParams

EVALUATION_STREAM = 2**31 - 1
"""Evaluations have their own stream of random numbers, the same at every step."""


def step_sampling(config: Config, stop_token_ids: tuple[int, ...], step: int, draw: int = 0) -> SamplingParams:
    """Parameters of one draw of prompts in a training step."""
    sampling = rollout_sampling(config, stop_token_ids).reseeded(step)
    return sampling.reseeded(draw) if draw else sampling


def rollout_sampling(config: Config, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """Parameters of training rollouts, before any step."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.samples_per_prompt,
        max_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
    )


def evaluation_sampling(
    config: Config, stop_token_ids: tuple[int, ...], suite: SuiteSettings | None = None
) -> SamplingParams:
    """Parameters of an evaluation: those of the suite if it sets them, else those of all suites."""
    settings = config.evaluation
    own = suite.over(settings) if suite else settings
    return SamplingParams(
        n=own.samples_per_prompt or settings.samples_per_prompt,
        max_tokens=own.max_response_tokens or config.rollout.max_response_tokens,
        temperature=settings.temperature if own.temperature is None else own.temperature,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
    ).reseeded(EVALUATION_STREAM)
