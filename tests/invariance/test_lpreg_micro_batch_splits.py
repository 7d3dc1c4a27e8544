"""Every method gives the same result for any partition of a batch into micro-batches and ranks, in any order.

A split distributes complete responses. The selected set must be exactly equal; loss, gradient and metrics must be equal
up to rounding. `test_selection_splits` covers ranks that each hold a part of the batch and select together.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import LossInputs, LossOutput, PolicyLoss, apply_rule, make_loss, token_stats, with_lp_reg
from lpreg.losses.registry import METHODS
from tests.tiers import examples

LENGTHS, VOCAB = (5, 1, 9, 3, 7, 2, 8, 4, 6, 11), 20
TOKENS = sum(LENGTHS)
RESPONSES = len(LENGTHS)

LOSSES = {
    "grpo": make_loss("grpo"),
    "grpo, mean of sequences": make_loss("grpo", aggregation="sequence_mean_token_mean"),
    "dr. grpo": make_loss("grpo", aggregation="constant_length", constant_length=12),
    "clip_higher": make_loss("clip_higher"),
    "dual_clip": make_loss("dual_clip", clip_dual=1.5),
    "gspo": make_loss("gspo", clip_low=0.1, clip_high=0.1),
    "cispo": make_loss("cispo", clip_high=0.5),
    "kl_cov": make_loss("kl_cov", share=0.2),
    "clip_cov": make_loss("clip_cov", share=0.1, cov_low=0.1, cov_high=3.0),
    "high_entropy": make_loss("high_entropy", share=0.2),
    "entropy_bonus": make_loss("entropy_bonus", coefficient=0.1),
    "dppo": make_loss("dppo", bound_low=0.05, bound_high=0.05),
    "dppo, kl": make_loss("dppo", divergence="kl", bound_low=0.02, bound_high=0.02),
    "drpo": make_loss("drpo", bound_low=0.05, bound_high=0.05),
    "sapo": make_loss("sapo"),
    "up": make_loss("up"),
    "vespo": make_loss("vespo"),
    "tre": make_loss("tre", coefficient=0.1),
    "tre, top-p": make_loss("tre", coefficient=0.1, region="top_p", top_p=0.8),
    "tre, min-p": make_loss("tre", coefficient=0.1, region="min_p"),
    "stapo": make_loss("stapo", tau_p=0.3, entropy_share=0.5),
    "lp_reg on dppo": with_lp_reg(make_loss("dppo", bound_low=0.05, bound_high=0.05), rho=0.3, min_p=0.1),
    "lp_reg on gspo": with_lp_reg(make_loss("gspo", clip_low=0.1, clip_high=0.1), rho=0.3, min_p=0.1),
    "lp_reg on sapo, lagged": with_lp_reg(make_loss("sapo"), rho=0.3, min_p=0.1, proxy_source="lagged"),
    "lp_reg paper": make_loss.preset("lp_reg", "paper", rho=0.3, min_p=0.1),
    "lp_reg k3": make_loss("lp_reg", rho=0.3, min_p=0.1, k3_clamp=0.5),
    "lp_reg old": make_loss("lp_reg", rho=0.3, min_p=0.1, proxy_source="old"),
    "lp_reg lagged": make_loss("lp_reg", rho=0.3, min_p=0.1, proxy_source="lagged", require_below_proxy=True),
    "lp_reg reverse": make_loss("lp_reg", rho=0.3, min_p=0.1, kl_estimator="reverse"),
    "lp_reg entropy": make_loss("lp_reg", rho=0.3, min_p=0.1, select_by="entropy"),
    "lp_reg random": make_loss("lp_reg", rho=0.3, min_p=0.1, select_by="random"),
    "lp_reg all": make_loss("lp_reg", min_p=0.1, select_by="all", advantage_sign="both"),
    "lp_reg fixed tau": make_loss("lp_reg", rho=0.3, fixed_tau=0.02),
    "lp_reg no tau": make_loss("lp_reg", rho=0.3, min_p=0, proxy_source="lagged"),
}


def batch() -> dict[str, Tensor]:
    """Off-policy by enough that the clips bind on some tokens. All [T]; logits [T, V]."""
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 2
    ids = torch.arange(RESPONSES).repeat_interleave(torch.tensor(LENGTHS))
    return {
        "old_logits": old,
        "logits": old + torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 0.5,
        "targets": torch.multinomial(old.softmax(-1), 1, generator=generator)[:, 0],
        "advantages": torch.randn(RESPONSES, generator=generator, dtype=torch.float64)[ids],
        "mask": torch.rand(TOKENS, generator=generator) < 0.9,
        "sequence_ids": ids,
        "token_ids": torch.arange(TOKENS),
    }


Split = list[list[int]]
"""The responses of each micro-batch, on any rank."""


def selected(loss: PolicyLoss, data: dict[str, Tensor], order: Tensor) -> Tensor:
    """Returns [T] bool in the order of the batch, from a ranking with the tokens in another order."""
    if loss.selection is None:
        return torch.zeros(TOKENS, dtype=torch.bool)
    old = token_stats(data["old_logits"][order], data["targets"][order])
    mask = apply_rule(
        loss.selection,
        data["mask"][order],
        log_probs=old.log_probs,
        entropy=old.entropy,
        advantages=data["advantages"][order],
        token_ids=data["token_ids"][order],
    ).mask
    return torch.zeros(TOKENS, dtype=torch.bool).index_put((order,), mask)


def places_of(split: Split) -> list[Tensor]:
    """The tokens of each micro-batch."""
    ids = batch()["sequence_ids"]
    return [torch.cat([(ids == response).nonzero().squeeze(1) for response in part]) for part in split if part]


def add_up(loss: PolicyLoss, places: list[Tensor]) -> tuple[float, Tensor, dict[str, Any], Tensor]:
    """Loss, gradient over the logits, metrics and selected tokens, summed over micro-batches of the given tokens."""
    data = batch()
    logits = data["logits"].requires_grad_()
    extra = loss.token_stats_kwargs()
    selection = selected(loss, data, torch.cat(places))
    counts = {
        "tokens": int(data["mask"].sum()),
        "sequences": RESPONSES,
        "selected_tokens": int(selection.sum()),
    }
    outputs: list[LossOutput] = []
    for at in places:
        stats = token_stats(logits[at], data["targets"][at], **extra)
        old = token_stats(data["old_logits"][at], data["targets"][at], **extra)
        inputs = LossInputs(
            log_probs=stats.log_probs,
            old_log_probs=old.log_probs,
            advantages=data["advantages"][at],
            mask=data["mask"][at],
            entropy=stats.entropy,
            log_z=stats.log_z,
            in_filter=stats.in_filter,
            filter_entropy=stats.filter_entropy,
            filter_extent=stats.filter_extent,
            old_log_z=old.log_z,
            old_in_filter=old.in_filter,
            proxy_log_probs=old.proxy_log_probs,
            sequence_ids=data["sequence_ids"][at],
            selection=selection[at],
            denominator=counts[loss.denominator_counts],
        )
        outputs.append(loss(inputs))
        outputs[-1].loss.backward()
    metrics = outputs[0].metrics
    for output in outputs[1:]:
        metrics = {name: mean + output.metrics[name] for name, mean in metrics.items()}
    assert logits.grad is not None
    return sum(float(output.loss.detach()) for output in outputs), logits.grad, metrics, selection


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Draws one of up to 4 ranks and one of up to 3 micro-batches for every response, in any order."""
    order = draw(st.permutations(range(RESPONSES)))
    ranks = draw(st.sampled_from([1, 2, 4]))
    micro_batches = ranks * draw(st.integers(1, 3))
    parts: Split = [[] for _ in range(micro_batches)]
    for response in order:
        parts[draw(st.integers(0, micro_batches - 1))].append(response)
    return parts


WHOLE = places_of([list(range(RESPONSES))])


@examples(15)
@given(split=splits())
@pytest.mark.parametrize("name", LOSSES)
def test_every_split_adds_up_to_the_batch(name: str, split: Split) -> None:
    whole_loss, whole_gradient, whole_metrics, whole_selection = add_up(LOSSES[name], WHOLE)
    loss, gradient, metrics, selection = add_up(LOSSES[name], places_of(split))
    assert torch.equal(selection, whole_selection)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-15)
    assert metrics.keys() == whole_metrics.keys()
    for metric, mean in metrics.items():
        assert mean.value == pytest.approx(whole_metrics[metric].value, rel=1e-12), metric


@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_exercises_clips_and_selection(name: str) -> None:
    """Clips bind, and rules select some tokens and not all; otherwise the test above would prove nothing."""
    loss = LOSSES[name]
    _, _, metrics, selection = add_up(loss, WHOLE)
    if "clip_fraction" in metrics and loss.name != "lp_reg":
        assert 0 < metrics["clip_fraction"].value < 1
    if loss.selection is not None:
        assert 0 < int(selection.sum()) < TOKENS
    if "selected_fraction" in metrics:
        assert 0 < metrics["selected_fraction"].value < 0.9


@pytest.mark.parametrize("name", LOSSES)
def test_only_separable_losses_may_be_split_inside_a_response(name: str) -> None:
    whole, _, _, _ = add_up(LOSSES[name], WHOLE)
    cut, _, _, _ = add_up(LOSSES[name], list(WHOLE[0].split(3)))
    assert (cut == pytest.approx(whole, rel=1e-12)) == LOSSES[name].token_separable


def test_every_method_has_a_definition_here() -> None:
    assert {loss.name for loss in LOSSES.values()} == {*METHODS, "with_lp_reg"}


def test_selection_inside_the_micro_batch_depends_on_the_split() -> None:
    """The scope of the published scripts gives another loss for every packing, so "batch" is the default."""
    loss = make_loss.preset("lp_reg", "reference", rho=0.1, min_p=0.1, require_below_proxy=False)
    whole, _, _, _ = add_up(loss, WHOLE)
    split, _, _, _ = add_up(loss, places_of([[response] for response in range(RESPONSES)]))
    assert abs(whole - split) > 1e-4
