"""The most likely next tokens are the same with the vocabulary split over real processes as with all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rl.actor.passes.candidates import top_candidates
from tests.invariance.ranks import RANKS, Results, run_ranks, split

SPLITS = (1, 2, 4)
VOCABULARY, COLUMNS, COUNT, TEMPERATURE = 83, 96, 30, 0.8


def full_logits() -> Tensor:
    """Padding has the largest logits, which must be ignored. Four ranks hold 24 columns each, fewer than COUNT."""
    logits = 3 * torch.randn(11, COLUMNS, generator=torch.Generator().manual_seed(0))
    logits[:, VOCABULARY:] = 50.0
    return logits


def work(rank: int) -> Results:
    found: Results = {}
    for size, group, place in split(rank, SPLITS):
        shard = full_logits().chunk(size, dim=1)[place]
        found[size] = top_candidates(shard, COUNT, temperature=TEMPERATURE, vocabulary=VOCABULARY, group=group)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("candidates"))


@pytest.mark.parametrize("size", SPLITS)
def test_candidates_equal_those_of_the_whole_vocabulary(found: list[Results], size: int) -> None:
    log_probs = torch.log_softmax(full_logits()[:, :VOCABULARY].double() / TEMPERATURE, -1)
    expected, expected_ids = log_probs.topk(COUNT, dim=-1)
    for rank in range(RANKS):
        ids, values = found[rank][size]
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
