"""However a batch is cut into micro-batches, they add up to the same loss, gradient and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpreg import LossInputs, LossOutput, PolicyLoss, make_loss, select_lowest, token_stats

TOKENS, VOCAB = 60, 20

LOSSES = {
    "grpo": make_loss("grpo"),
    "lp_reg paper": make_loss.preset("lp_reg", "paper", rho=0.3, min_p=0.1),
    "lp_reg k3": make_loss("lp_reg", rho=0.3, min_p=0.1, k3_clamp=0.5),
    "lp_reg old": make_loss("lp_reg", rho=0.3, min_p=0.1, proxy_source="old"),
    "lp_reg lagged": make_loss("lp_reg", rho=0.3, min_p=0.1, proxy_source="lagged", require_below_proxy=True),
}


def batch() -> dict[str, torch.Tensor]:
    """Off-policy by enough that the clip binds on some tokens."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 2
    return {
        "old_logits": old,
        "logits": old + torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 0.5,
        "targets": torch.multinomial(old.softmax(-1), 1, generator=generator)[:, 0],
        "advantages": torch.randn(TOKENS, generator=generator, dtype=torch.float64),
        "mask": torch.rand(TOKENS, generator=generator) < 0.9,
    }


def add_up(loss: PolicyLoss, cuts: list[int]) -> tuple[float, torch.Tensor, dict[str, Any]]:
    """Loss, gradient over the logits and metrics, summed over the micro-batches between the cuts."""
    data = batch()
    logits = data["logits"].requires_grad_()
    filters = loss.token_stats_kwargs()
    old = token_stats(data["old_logits"], data["targets"], **filters)
    selection = select_lowest(old.log_probs, data["mask"], loss.selection_fraction or 1.0).mask
    outputs: list[LossOutput] = []
    for start, stop in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        part = slice(start, stop)
        stats = token_stats(logits[part], data["targets"][part], log_z_rows=selection[part], **filters)
        inputs = LossInputs(
            log_probs=stats.log_probs,
            old_log_probs=old.log_probs[part],
            advantages=data["advantages"][part],
            mask=data["mask"][part],
            log_z=stats.log_z,
            kept=stats.kept,
            old_log_z=old.log_z[part],
            old_kept=old.kept[part],
            proxy_log_probs=old.proxy_log_probs[part],
            selection=selection[part],
            denominator=int(data["mask"].sum()),
        )
        outputs.append(loss(inputs))
        outputs[-1].loss.backward()
    metrics = outputs[0].metrics
    for output in outputs[1:]:
        metrics = {name: mean + output.metrics[name] for name, mean in metrics.items()}
    assert logits.grad is not None
    return sum(float(output.loss.detach()) for output in outputs), logits.grad, metrics


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, TOKENS), max_size=6).map(sorted))
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(name: str, cuts: list[int]) -> None:
    whole_loss, whole_gradient, whole_metrics = add_up(LOSSES[name], [])
    loss, gradient, metrics = add_up(LOSSES[name], cuts)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-15)
    assert metrics.keys() == whole_metrics.keys()
    for metric, mean in metrics.items():
        assert mean.value == pytest.approx(whole_metrics[metric].value, rel=1e-12), metric
    if name != "grpo":
        assert 0 < metrics["selected_fraction"].value < 0.3, "the regulariser must be at work in this test"


def test_selection_inside_the_micro_batch_depends_on_the_split() -> None:
    """Why "batch" is the default: the scope of the published scripts gives another loss for every packing."""
    loss = make_loss.preset("lp_reg", "reference", rho=0.1, min_p=0.1, require_below_proxy=False)
    whole, _, _ = add_up(loss, [])
    split, _, _ = add_up(loss, [10, 20, 30, 40, 50])
    assert abs(whole - split) > 1e-4
