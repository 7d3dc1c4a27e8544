"""Agents of the tests."""

from __future__ import annotations

from megatron_rl.agent.model import Model
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.types import Prompt, Response, Sample


async def two_attempts(model: Model, prompt: Prompt) -> float:
    """Answers twice, with two sequences that share the prompt. The best answer counts."""
    scores = []
    for _ in range(2):
        answer = await model.generate(prompt.token_ids, max_tokens=23)
        response: Response = answer.response
        scores.append(verify_countdown(Sample(prompt, response, answer.text)).score)
    return max(scores)


async def fails_now_and_then(model: Model, prompt: Prompt) -> None:
    """Fails in about one of eight rollouts; the verifier grades the others."""
    answer = await model.generate(prompt.token_ids)
    if sum(answer.response.token_ids) % 8 == 0:
        raise RuntimeError("the environment is gone")
