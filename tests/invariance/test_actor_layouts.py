"""An RL step is the same under every layout and every setting that only trades memory for time.

Loss, statistics, logits, gradients and new weights are compared with those of one rank with padded sequences,
materialised logits and default settings otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_rl.parallel.layout import Layout
from tests import ranks
from tests.hf_models import write_hf_model
from tests.invariance.actor_steps import run_rank
from tests.tiers import chosen, quick_of

PLAIN = {"rows": "padded", "lm_head": "materialised"}
PACKED = {"rows": "packed"}
"""Without this setting sequences share positions, which is the default on a CPU."""
FLEX = {"flex": True}
"""Sequences share positions, and the attention is that of Transformer Engine's layers, with a reference kernel."""
FULL = {"recompute": {"granularity": "full"}}
SELECTIVE = {"recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]}}
SP = {"sequence_parallel": True}
TIED = {"model": "tied"}
EXPERTS = {"model": "experts"}
OVERLAPPED = {"overlap_grad_reduce": True}
"""Without this setting a CPU sums gradients over replicas after the backward pass."""
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, dict[str, Any]]]] = {
    "one rank": (
        {},
        {
            "plain": PLAIN,
            "tied, plain": TIED | PLAIN,
            "fused": {},
            "tied, fused": TIED,
            "materialised": {"lm_head": "materialised"},
            "packed, fused": PACKED,
            "padded, fused": {"rows": "padded"},
            "flex": FLEX,
            "tied, flex": FLEX | TIED,
            "experts, flex": FLEX | EXPERTS,
            "full recompute": FULL,
            "selective recompute": SELECTIVE,
            "offloaded optimizer": {"offload_optimizer": True},
            "experts, plain": EXPERTS | PLAIN,
            "experts, fused": EXPERTS,
            "experts, packed, fused": EXPERTS | PACKED,
        },
    ),
    "tp2": (
        {"tensor": 2},
        {
            "tp2, plain": PLAIN,
            "tp2, fused": {},
            "tp2, sp, plain": SP | PLAIN,
            "tied, tp2, sp, plain": TIED | SP | PLAIN,
            "tp2, sp, fused": SP,
            "tp2, sp, packed, fused": SP | PACKED,
            "tied, tp2, sp, fused": TIED | SP,
            "tp2, sp, flex": SP | FLEX,
            "tp2, sp, flex, selective recompute": SP | FLEX | SELECTIVE,
            "tp2, sp, full recompute": SP | FULL,
            "tp2, sp, selective recompute": SP | SELECTIVE,
        },
    ),
    "pp2": (
        {"pipeline": 2},
        {"pp2, plain": PLAIN, "pp2, fused": {}, "tied, pp2, fused": TIED, "pp2, packed, full recompute": FULL | PACKED},
    ),
    "pp2, interleaved": (
        {"pipeline": 2, "virtual_pipeline": 2},
        {
            "pp2, interleaved": {},
            "pp2, flex, interleaved": FLEX | FULL,
            "tied, pp2, packed, interleaved": TIED | FULL | PACKED,
        },
    ),
    "dp2": (
        {"data": 2},
        {
            "dp2, plain": PLAIN | {"distributed_optimizer": False},
            "dp2, distributed optimizer": {},
            "dp2, packed": PACKED,
            "dp2, flex": FLEX,
            "dp2, overlapped sum": OVERLAPPED,
            "tied, dp2, overlapped sum": TIED | OVERLAPPED,
            "experts, dp2, overlapped sum": EXPERTS | OVERLAPPED,
        },
    ),
    "tp2-pp2": (
        {"tensor": 2, "pipeline": 2},
        {"tp2-pp2": {}, "tp2-pp2, sp": SP | SELECTIVE, "tied, tp2-pp2, sp": TIED | SP},
    ),
    "tp2-pp2, interleaved": (
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
        {"tied, tp2-pp2, sp, interleaved": TIED | SP},
    ),
    "dp2-ep2": ({"data": 2, "expert": 2}, {"experts, dp2-ep2": EXPERTS, "experts, dp2-ep2, recompute": EXPERTS | FULL}),
    "tp2-ep2": ({"tensor": 2, "expert": 2}, {"experts, tp2-ep2, sp": EXPERTS | SP}),
    "tp2-dp2": ({"tensor": 2, "data": 2}, {"tied, tp2-dp2, sp": TIED | SP}),
}
LOSSES = ("supervised", "lp_reg", "entropy_bonus", "gspo")

QUICK = {
    *LAYOUTS["one rank"][1],
    *(
        "tp2, sp, flex, selective recompute",
        "tp2, sp, fused",
        "tp2, sp, packed, fused",
        "tied, tp2, sp, fused",
        "tp2, sp, plain",
    ),
    *(
        "tied, pp2, packed, interleaved",
        "dp2, distributed optimizer",
        "tied, dp2, overlapped sum",
        "dp2, overlapped sum",
        "tied, tp2-pp2, sp, interleaved",
    ),
    *("experts, dp2-ep2", "experts, tp2-ep2, sp"),
}
"""One variant or more of every kind of parallelism and of every setting; the others combine the same in other ways."""

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Returns a function that gives what a variant did. All variants of a layout share one start of its processes."""
    folder = tmp_path_factory.mktemp("steps")
    for name in ("untied", "tied", "experts"):
        shape = {"vocab_size": 51, "num_hidden_layers": 4, "tie_word_embeddings": name == "tied"}
        write_hf_model(folder / name, "qwen3_moe" if name == "experts" else "qwen3", noise=0.1, **shape)
    needed = chosen(request, "variant")
    needed |= {plain(variant) for variant in needed}
    for degrees, variants in LAYOUTS.values():
        mine = {name: {"model": "untied"} | variant for name, variant in variants.items() if name in needed}
        if mine:
            layout = Layout(**degrees)
            ranks.run_ranks(run_rank, layout.world_size, layout, mine, folder)
    return lambda variant: torch.load(folder / f"{variant}.pt")


def plain(variant: str) -> str:
    """Returns the variant that this one is compared with."""
    return next((f"{kind}, " for kind in ("tied", "experts") if kind in variant), "") + "plain"


@pytest.mark.parametrize("variant", quick_of((name for _, variants in LAYOUTS.values() for name in variants), QUICK))
def test_a_step_equals_that_of_one_plain_rank(found: Callable[[str], Found], variant: str) -> None:
    expected, got = found(plain(variant)), found(variant)
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
    for loss in LOSSES:
        check_step(got[loss], expected[loss])


def check_step(got: Found, expected: Found) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for kind in ("seen", "scored"):
        assert torch.equal(got[kind].pop("in_filter"), expected[kind].pop("in_filter"))
        torch.testing.assert_close(got[kind], expected[kind], atol=2e-6, rtol=1e-5)
    assert got["gradient"].keys() == expected["gradient"].keys()
    for name, gradient in expected["gradient"].items():
        error = (got["gradient"][name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name  # the gradient of an expert that no token chose is zero
    torch.testing.assert_close(got["weights"], expected["weights"], atol=1e-6, rtol=1e-6)
