"""The correction for the gap between engine and actor, and which policies it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lpreg import token_stats
from megatron_rl.actor.loss_inputs import loss_inputs
from megatron_rl.actor.micro_batch import MicroBatch
from megatron_rl.config.algorithm import CorrectionSettings

TOKENS = 6
GAP = torch.tensor([0.0, 1.0, -1.0, 0.1, -0.1, 0.5])
SEQUENCES = torch.tensor([7, 7, 7, 9, 9, 4])


def build(off_policy: bool = False, **correction: Any) -> tuple[Any, dict[str, float]]:
    """The inputs of a micro-batch in which the actor is `GAP` above the engine, and the values of the metrics."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, 5, generator=generator).requires_grad_()
    targets = torch.arange(TOKENS) % 5
    stats = token_stats(logits, targets)
    actor = stats.log_probs.detach()
    values = {"advantages": torch.linspace(-1, 1, TOKENS), "rollout_log_probs": actor - GAP}
    if off_policy:  # the actor has moved on since; the gap is that of the old one
        values |= {"old_log_probs": actor - 5, "rollout_log_probs": actor - 5 - GAP}
    part = MicroBatch(**_rows(), targets=targets, values=values, sequence_ids=SEQUENCES)
    inputs, metrics = loss_inputs(stats, part, 10.0, CorrectionSettings.model_validate(correction))
    return inputs, {name: mean.value for name, mean in metrics.items()}


def _rows() -> dict[str, Any]:
    empty = torch.zeros(0, dtype=torch.int64)
    unread = {"tokens": empty, "positions": empty, "predictors": empty, "rows": ()}
    known = set(MicroBatch.__dataclass_fields__)
    return {name: value for name, value in unread.items() if name in known}


def test_nothing_is_corrected_unless_asked_for() -> None:
    inputs, metrics = build()
    assert torch.equal(inputs.advantages, torch.linspace(-1, 1, TOKENS))
    assert inputs.mask is None and metrics == {} and inputs.old_log_probs is None and inputs.denominator == 10.0


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    ("settings", "weights", "bounded"),
    [
        ({"weights": "truncated"}, GAP.exp().clamp(max=2.0), 1),
        ({"weights": "truncated", "high": 1.05}, GAP.exp().clamp(max=1.05), 3),
        ({"weights": "masked"}, torch.where(GAP.abs() < 0.6, GAP.exp(), 0.0), 2),
        ({"weights": "masked", "low": 0.3, "high": 3.0}, GAP.exp(), 0),
    ],
)
def test_weights(off_policy: bool, settings: dict[str, Any], weights: torch.Tensor, bounded: int) -> None:
    inputs, metrics = build(off_policy, **settings)
    torch.testing.assert_close(inputs.advantages, torch.linspace(-1, 1, TOKENS) * weights)
    assert not inputs.advantages.requires_grad and inputs.mask is None
    assert metrics["correction_weight"] == pytest.approx(float(weights.mean()))
    assert metrics["correction_bounded_fraction"] == bounded / TOKENS


@pytest.mark.parametrize("off_policy", [False, True])
def test_rejected_responses_do_not_count(off_policy: bool) -> None:
    """In the first two responses the gaps cancel."""
    inputs, metrics = build(off_policy, reject_sequences=True)
    assert inputs.mask.tolist() == [True] * 5 + [False]
    assert metrics == {"correction_rejected_fraction": pytest.approx(1 / TOKENS)}
    inputs, metrics = build(off_policy, reject_sequences=True, sequence_high=2.0)
    assert inputs.mask.all()
