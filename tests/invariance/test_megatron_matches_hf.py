"""Megatron matches Hugging Face in logits, loss, gradients and weights, however the model is split over processes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.parallel.layout import Layout
from tests import ranks
from tests.invariance.megatron_worker import run_rank
from tests.tiers import chosen, slow

DENSE = ("qwen3", "qwen3-tied", "qwen2", "qwen2-tied", "llama", "llama-tied-biased")
SPARSE = ("qwen3-moe", "qwen3-moe-mixed")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp2-sp-dp2": {"tensor": 2, "data": 2, "sequence_parallel": True},
    "tp2-sp-ep2": {"tensor": 2, "expert": 2, "sequence_parallel": True},
    "ep2": {"data": 2, "expert": 2},
    "pp2-ep2": {"pipeline": 2, "data": 2, "expert": 2},
}
TOLERANCE = 1e-5


def cases(layout: dict[str, Any]) -> tuple[str, ...]:
    """With tensor parallelism experts need sequence parallelism; a dense model has no use for expert ranks."""
    sparse = "tensor" not in layout or "sequence_parallel" in layout
    return (() if "expert" in layout else DENSE) + (SPARSE if sparse else ())


QUICK = ("tp2-pp2", "tp2-sp-dp2", "tp2-sp-ep2", "ep2", "pp2-ep2")
"""Each of the other layouts is part of one of these."""

Measured = list[dict[str, Any]]
every_case = pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(name, case, marks=() if name in QUICK else slow)
        for name, degrees in LAYOUTS.items()
        for case in cases(degrees)
    ],
)


@pytest.fixture(scope="module")
def measured_by_layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Returns the measurements of every rank, in one start of the processes per layout."""
    folder, found = tmp_path_factory.mktemp("meetings"), {}
    for name in chosen(request, "layout"):
        layout = Layout(**LAYOUTS[name])
        found[name] = ranks.run_ranks(run_rank, layout.world_size, layout, folder / name, list(cases(LAYOUTS[name])))
    return found


@pytest.fixture
def measured(layout: str, measured_by_layout: dict[str, Measured]) -> Measured:
    return measured_by_layout[layout]


@every_case
def test_logits_and_loss_match_transformers(measured: Measured, case: str) -> None:
    last = [rank[case] for rank in measured if rank[case]["is_last_stage"]]
    assert max(rank["logits_error"] for rank in last) < TOLERANCE
    # Each data-parallel rank holds a part of the loss; tensor-parallel ranks hold the same part.
    loss = sum(rank["loss"] for rank in last if rank["tensor_rank"] == 0)
    assert loss == pytest.approx(last[0]["expected_loss"], rel=TOLERANCE)


@every_case
def test_every_gradient_matches_transformers(measured: Measured, case: str) -> None:
    errors: dict[str, float] = {}
    for rank in measured:
        for name, error in rank[case]["gradient_errors"].items():
            errors[name] = max(error, errors.get(name, 0.0))
    assert sorted(errors) == measured[0][case]["expected_names"]
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@every_case
def test_the_gradient_norm_counts_every_parameter_once(measured: Measured, case: str) -> None:
    for rank in measured:
        assert rank[case]["grad_norm"] == pytest.approx(rank[case]["expected_grad_norm"], rel=TOLERANCE)


@every_case
def test_weights_survive_the_round_trip_exactly(measured: Measured, case: str) -> None:
    ranks = [rank[case] for rank in measured]
    assert sorted({name for rank in ranks for name in rank["exported"]}) == ranks[0]["expected_names"]
    assert sorted(name for rank in ranks for name in rank["published"]) == ranks[0]["expected_names"]
    for error in ("export_error", "publish_error", "import_error", "bf16_export_error"):
        assert max(rank[error] for rank in ranks) == 0.0, error
