"""Context-parallel ranks each have the statistics of the tokens they predict; together they have one loss and its
gradient. Only this and the order of tokens is the project's own; attention over the parts is Transformer Engine's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lpreg import LossInputs, TokenStats, make_loss, token_stats
from megatron_rl.batching.context import held_by
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.context_statistics import gather_over_context_ranks
from tests.invariance.ranks import RANKS, Results, run_ranks

LENGTHS = (8, 24, 16)
TOKENS, WIDTH, VOCABULARY = sum(LENGTHS), 6, 11
LOSSES = {
    "grpo": {},
    "gspo": {"clip_low": 0.99, "clip_high": 100.0},
    "lp_reg": {"proxy_source": "current", "kl_estimator": "full", "min_p": 0.3},
}


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "hidden": torch.randn(TOKENS, WIDTH, dtype=torch.float64),
        "weight": torch.randn(VOCABULARY, WIDTH, dtype=torch.float64),
        "targets": torch.randint(VOCABULARY, (TOKENS,)),
        "advantages": torch.randn(len(LENGTHS), dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS)),
        "old_log_probs": -2 - torch.rand(TOKENS, dtype=torch.float64),
    }


def loss_and_gradient(name: str, places: torch.Tensor | None) -> Results:
    """places: the tokens this rank has; None: all, and nothing is gathered."""
    given = inputs()
    weight, mine = given["weight"].requires_grad_(), slice(None) if places is None else places
    loss = make_loss(name, **LOSSES[name])
    logits = given["hidden"][mine] @ weight.T
    stats: TokenStats = token_stats(logits, given["targets"][mine], **loss.token_stats_kwargs())
    if places is not None:
        stats = gather_over_context_ranks(stats, places, TOKENS)
    found = {field: getattr(stats, field) for field in ("log_probs", "entropy", "log_z", "in_filter", "proxy_kl")}
    fields = {field: given[field] for field in ("advantages", "old_log_probs")} | {
        "selection": torch.arange(TOKENS) % 2 == 0,
        "sequence_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        "denominator": TOKENS,
    }
    value = loss(LossInputs(**found, **fields)).loss
    value.backward()
    return {"loss": value.detach(), "gradient": weight.grad}


def work(rank: int) -> Results:
    process_groups.cp_group = lambda: dist.group.WORLD
    places = torch.from_numpy(np.sort(held_by(rank, RANKS, LENGTHS)))
    results = {name: loss_and_gradient(name, places) for name in LOSSES}
    for result in results.values():
        dist.all_reduce(result["gradient"])  # as data parallelism does
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_one_rank(ranks: list[Results], name: str) -> None:
    expected = loss_and_gradient(name, None)
    assert expected["gradient"].abs().max() > 0
    for found in ranks:
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-10)
