"""Tokens are drawn from the distribution whose log-probs are returned."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.rollout.engines.transformers.engine import TransformersEngine, _sample
from megatron_rl.types import SamplingParams

DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, -30.0])
CHI_SQUARE_5_AT_1E_6 = 35.9
"""Quantile at 1 - 1e-6 with five degrees of freedom."""


def chi_square(drawn: torch.Tensor, p: torch.Tensor) -> float:
    counts = torch.bincount(drawn, minlength=len(p)).double()
    expected = p.double() * len(drawn)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, log_probs = _sample(LOGITS.expand(DRAWS, -1), temperature, generator)
    log_p = torch.log_softmax(LOGITS / temperature, -1)
    torch.testing.assert_close(log_probs, log_p[drawn])
    assert not (drawn == 5).any()  # e^-30
    assert chi_square(drawn, log_p[:5].exp()) < CHI_SQUARE_5_AT_1E_6
    # The test is sensitive enough: tokens at another temperature fail it.
    assert chi_square(drawn, torch.softmax(LOGITS[:5] / (temperature + 0.2), -1)) > CHI_SQUARE_5_AT_1E_6


def test_rows_and_steps_are_independent() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (_sample(torch.zeros(DRAWS, 2), 1.0, generator)[0] for _ in range(2))
    pairs = 2 * first + second
    assert chi_square(pairs, torch.full((4,), 0.25)) < CHI_SQUARE_5_AT_1E_6


def test_an_engine_draws_the_first_token_from_the_models_distribution(engine: TransformersEngine) -> None:
    """This covers the whole path: prefill, repetition, and a batch for each prompt."""
    prompt = [1, 2, 3]
    sampling = SamplingParams(n=512, max_tokens=1, temperature=1.0, stop_token_ids=(), seed=0)
    drawn = torch.tensor([int(g.token_ids[0]) for group in engine.generate([prompt] * 8, sampling) for g in group])
    with torch.inference_mode():
        p = torch.softmax(engine.model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    order = p.argsort(descending=True)
    grouped = torch.cat([p[order[:5]], p[order[5:]].sum()[None]])  # the likeliest five, and the rest as one
    place = torch.full((len(p),), 5)
    place[order[:5]] = torch.arange(5)
    assert chi_square(place[drawn], grouped) < CHI_SQUARE_5_AT_1E_6
