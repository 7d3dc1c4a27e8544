"""The fused forms over real processes: the same bits on every rank, the numbers of one process, few collectives.

The tests start four ranks once and compare what these return.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import LossInputs, fused_loss, fused_token_stats, make_loss
from lpreg.statistics.fused_loss import FROM_THE_MODEL
from tests.invariance.ranks import RANKS, Results, run_ranks, split

SPLITS = (2, 4)
TOKENS, WIDTH, CHUNK = 28, 6, 8
FORMS = ("recompute", "in forward")
STATISTICS = ("log_probs", "entropy", "log_z", "max_logit", "in_filter")
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter")


@dataclass(frozen=True)
class Case:
    columns: int
    """Number of columns of all ranks together, padding included."""
    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict)
    some_rows: bool = True
    sequence_parallel: bool = False
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "lp_reg", "kl_estimator": "full", "min_p": 0.1})


CASES = {
    "plain": Case(96),
    "all rows": Case(96, some_rows=False),
    "warm, no entropy": Case(96, settings={"temperature": 0.7, "entropy": "none"}),
    "two shards all padding": Case(40, settings={"vocab_size": 17}),
    "one true column": Case(8, settings={"vocab_size": 1}, some_rows=False),
    "fixed threshold": Case(96, some_rows=False, loss={"name": "lp_reg", "kl_estimator": "full", "fixed_tau": 0.02}),
    "entropy of the nucleus": Case(
        96, some_rows=False, loss={"name": "tre", "region": "top_p", "top_p": 0.8, "coefficient": 0.5}
    ),
    "sequence parallel": Case(96, settings={"vocab_size": 90}, sequence_parallel=True),
    "fp32": Case(512, torch.float32, {"vocab_size": 500}),
    "bf16": Case(512, torch.bfloat16, {"vocab_size": 500}),
    "bf16 sequence parallel": Case(512, torch.bfloat16, sequence_parallel=True),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """hidden [TOKENS, d], weight [columns, d] with NaN in the padding, targets, fields of the loss."""
    generator = torch.Generator().manual_seed(case.columns)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(case.columns, WIDTH, generator=generator, dtype=torch.float64)
    vocab = case.settings.get("vocab_size", case.columns)
    weight[vocab:] = torch.nan
    advantages = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    fields = {
        "advantages": torch.where(torch.arange(TOKENS) % 3 == 0, 0.0, advantages),
        "selection": torch.rand(TOKENS, generator=generator) < 0.5,
        "denominator": TOKENS,
    }
    return hidden.to(case.dtype), weight.to(case.dtype), torch.randint(vocab, (TOKENS,), generator=generator), fields


def run(case: Case, form: str, group: dist.ProcessGroup | None, rank: int, ranks: int) -> dict[str, Any]:
    hidden, weight, targets, fields = inputs(case)
    width, part = case.columns // ranks, TOKENS // ranks
    shard = weight[rank * width : (rank + 1) * width].clone().requires_grad_()
    if case.sequence_parallel:
        hidden = hidden[rank * part : (rank + 1) * part]
    hidden = hidden.clone().requires_grad_()
    loss = make_loss(**case.loss)
    shared = {
        "chunk_tokens": CHUNK,
        "sequence_parallel": case.sequence_parallel,
        "tp_group": group,
        "log_z_rows": fields["selection"] if case.some_rows else None,
        **case.settings,
    }
    # Function bodies look these up when they are called.
    patches = {name: mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in COLLECTIVES}
    counted = {name: patch.start() for name, patch in patches.items()}
    if form == "recompute":
        stats = fused_token_stats(hidden, shard, targets, **loss.token_stats_kwargs(), **shared)
        output = loss(LossInputs(**{name: getattr(stats, name) for name in FROM_THE_MODEL}, **fields))
    else:
        output, stats = fused_loss(hidden, shard, targets, loss, fields, **shared)
    forward = Counter({name: calls.call_count for name, calls in counted.items()})
    output.loss.backward()
    backward = Counter({name: calls.call_count for name, calls in counted.items()}) - forward
    mock.patch.stopall()
    saved = {name: getattr(stats, name) for name in STATISTICS}
    return {name: value.detach() for name, value in saved.items() if value is not None} | {
        "loss": output.loss.detach(),
        "d_hidden": hidden.grad,
        "d_weight": shard.grad,
        "forward": {name: count for name, count in forward.items() if count},
        "backward": {name: count for name, count in backward.items() if count},
    }


def refusal(form: str, group: dist.ProcessGroup, rank: int) -> str:
    """Returns the error of a rank if the weight of another rank holds a NaN."""
    case = Case(16)
    with mock.patch(f"{__name__}.inputs", wraps=inputs) as patched:
        hidden, weight, targets, fields = inputs(case)
        weight[5] = torch.nan
        patched.return_value = (hidden, weight, targets, fields)
        patched.side_effect = None
        try:
            run(case, form, group, rank, dist.get_world_size(group))
        except ValueError as error:
            return str(error)
        finally:
            mock.patch.stopall()
    return "accepted"


def work(rank: int) -> Results:
    results: Results = {}
    for ranks, group, place in split(rank, SPLITS):
        for form in FORMS:
            for name, case in CASES.items():
                results[ranks, form, name] = run(case, form, group, place, ranks)
            results[ranks, form, "refusal"] = refusal(form, group, place)
    return results


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_bits(by_rank: list[Results], name: str, form: str, ranks: int) -> None:
    first = by_rank[0][ranks, form, name]
    for rank in range(1, RANKS):
        for statistic in {*STATISTICS, "loss"} & first.keys():
            assert torch.equal(by_rank[rank][ranks, form, name][statistic], first[statistic]), f"{statistic}, {rank}"


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_the_split_does_not_change_the_results(by_rank: list[Results], name: str, form: str, ranks: int) -> None:
    case = CASES[name]
    want = run(case, form, None, 0, 1)
    parts = [by_rank[rank][ranks, form, name] for rank in range(ranks)]
    got = dict(parts[0])
    got["d_weight"] = torch.cat([part["d_weight"] for part in parts])
    if case.sequence_parallel:
        got["d_hidden"] = torch.cat([part["d_hidden"] for part in parts])
    else:
        for part in parts[1:]:
            torch.testing.assert_close(part["d_hidden"], got["d_hidden"])
    assert torch.equal(got["in_filter"], want["in_filter"])
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[case.dtype]
    for number in {*STATISTICS, "loss", "d_hidden", "d_weight"} & want.keys():
        scale = float(want[number].abs().max()) if number.startswith("d_") else 1.0
        torch.testing.assert_close(got[number], want[number], rtol=rounding, atol=rounding * scale)
    assert (got["d_weight"][case.settings.get("vocab_size", case.columns) :] == 0).all()


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_collectives_is_as_documented(by_rank: list[Results], name: str, ranks: int) -> None:
    sequence_parallel = CASES[name].sequence_parallel
    gather = 1 if sequence_parallel else 0
    sum_of_hidden = {"reduce_scatter" if sequence_parallel else "all_reduce": 1}
    recompute = by_rank[0][ranks, "recompute", name]
    assert recompute["forward"] == {"all_gather": 2 + gather}
    assert recompute["backward"] == sum_of_hidden
    in_forward = by_rank[0][ranks, "in forward", name]
    assert in_forward["forward"].pop("all_gather") <= 2 * -(-TOKENS // CHUNK) + gather
    assert in_forward["forward"] == sum_of_hidden
    assert in_forward["backward"] == {}


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_on_one_rank_is_refused_on_all(by_rank: list[Results], form: str, ranks: int) -> None:
    for results in by_rank:
        assert "rows hold NaN" in results[ranks, form, "refusal"]
