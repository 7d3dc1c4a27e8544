"""Responses of real servers are sampled from the policy, and have its log-probs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerRefused
from megatron_rl.types import Response, SamplingParams
from tests.engines.conftest import CONTEXT, Run

PROMPTS = [(1, 20, 31, 7), (1, 5), (1, 60, 61, 62, 63, 9)]
STOPS = (2, 11, 12, 13, 14, 15, 16)
SAMPLING = SamplingParams(n=6, max_tokens=24, temperature=1.0, stop_token_ids=STOPS, seed=5)


def largest_gap(model: Path, prompt: tuple[int, ...], response: Response, temperature: float) -> float:
    """Largest difference of log-probs from a forward pass of plain transformers over the whole sequence."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = policy(torch.tensor([[*prompt, *response.token_ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
    token_ids = torch.tensor(response.token_ids).long()
    log_p = torch.log_softmax(logits / temperature, -1).gather(1, token_ids[:, None])[:, 0]
    return float((log_p - torch.tensor(response.log_probs)).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_at_the_sampling_temperature(
    engine: HttpEngine, run: Run[list[list[Response]]], model: Path, temperature: float
) -> None:
    groups = run(engine.generate(PROMPTS, replace(SAMPLING, temperature=temperature)))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            assert largest_gap(model, prompt, response, temperature) < 1e-4


def test_responses_of_a_group_differ_and_end_where_they_should(
    engine: HttpEngine, run: Run[list[list[Response]]]
) -> None:
    groups = run(engine.generate(PROMPTS, SAMPLING))
    assert [len(group) for group in groups] == [SAMPLING.n] * len(PROMPTS)
    reasons: Counter[str] = Counter()
    for group in groups:
        assert len({tuple(response.token_ids.tolist()) for response in group}) > 1
        for response in group:
            *before, last = response.token_ids.tolist()
            assert not set(before) & set(STOPS)
            assert (last in STOPS) == (response.finish_reason == "stop")
            assert len(response) == SAMPLING.max_tokens or response.finish_reason == "stop"
            reasons[response.finish_reason] += 1
    assert set(reasons) == {"stop", "length"}


def test_only_our_own_stop_tokens_end_a_response(engine: HttpEngine, run: Run[list[list[Response]]]) -> None:
    """The model's own end token is 2."""
    groups = run(engine.generate([(1, 5)], replace(SAMPLING, n=128, max_tokens=16, stop_token_ids=(93,))))
    assert any(2 in response.token_ids[:-1] for response in groups[0]), "a likely token was never sampled"
    for response in groups[0]:
        assert len(response) == 16 or response.token_ids[-1] == 93


def test_every_token_comes_from_the_whole_distribution(engine: HttpEngine, run: Run[list[list[Response]]]) -> None:
    """There is no top-p and no top-k: all tokens of an untrained model are sampled."""
    groups = run(engine.generate([(1, 5)], replace(SAMPLING, n=128, max_tokens=50, stop_token_ids=(94,))))
    seen = {token for response in groups[0] for token in response.token_ids.tolist()}
    assert len(seen) == 95


def test_a_prompt_that_is_too_long_is_refused_with_a_reason(engine: HttpEngine, run: Run[list[list[Response]]]) -> None:
    with pytest.raises(ServerRefused, match=r"(?i)(maximum|longer).*(context|length)"):
        run(engine.generate([(1, 5) * CONTEXT], SAMPLING))
