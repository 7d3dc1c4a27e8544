"""TRL's trainer with lpreg's losses: the gradient of an update equals that of a plain restatement over all its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.dense_methods import DEFINITIONS, Batch
from tests.tiers import quick_of
from tests.trl_runs import Recorder, Update, Weights, run, tiny_model

QUICK_ON_POLICY = (
    "lp_reg, paper",
    "lp_reg, paper lagged",
    "lp_reg, reference",
    "grpo",
    "high_entropy",
    "entropy_bonus",
)
QUICK_OFF_POLICY = (
    *("lp_reg, paper", "lp_reg, paper off-policy", "lp_reg, paper lagged", "lp_reg, reference"),
    *("grpo", "dr. grpo", "gspo", "kl_cov", "high_entropy"),
)
"""One method per way in which the trainer treats a loss. The others differ from these in their formula alone, which
`test_methods.py` holds to the same definitions."""
WHOLE = {"per_device_train_batch_size": 12}
MICRO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


def dense_batch(generation: list[Update], weights: Weights, old: Weights, lagged: Weights) -> Batch:
    """The rows of a generation one by one and unpadded, through a plain model with the given weights; the loss is that
    of its first update. Positions are those of the padded rows: transformers rotates in fp32, where a shift shows."""
    model, rows = tiny_model(), []
    for number, batch in ((number, b) for number, update in enumerate(generation) for b in update.micro_batches):
        for row in range(len(batch["completion_ids"])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            response = batch["completion_ids"][row][: int(batch["completion_mask"][row].sum())]
            mask = batch["tool_mask"][row][: len(response)].bool()
            positions = torch.arange(len(prompt) + len(response)) + int((batch["prompt_mask"][row] == 0).sum())
            rows.append((prompt, response, mask, float(batch["advantages"][row]), number == 0, positions))

    def logits(of: Weights) -> Tensor:
        parts = []
        for prompt, response, *_, positions in rows:
            inputs = {"input_ids": torch.cat([prompt, response])[None], "position_ids": positions[None]}
            output = functional_call(model, of, (), inputs | {"use_cache": False})
            parts.append(output.logits[0, len(prompt) - 1 : -1])
        return torch.cat(parts)

    lengths = torch.tensor([len(response) for _, response, *_ in rows])
    advantages = torch.tensor([row[3] for row in rows], dtype=torch.float64)
    with torch.no_grad():
        old_logits, lagged_logits = logits(old), logits(lagged)
    return Batch(
        logits=logits(weights),
        old_logits=old_logits,
        lagged_logits=lagged_logits,
        targets=torch.cat([row[1] for row in rows]),
        advantages=advantages.repeat_interleave(lengths),
        mask=torch.cat([row[2] for row in rows]),
        sequence_ids=torch.arange(len(rows)).repeat_interleave(lengths),
        update=torch.tensor([row[4] for row in rows]).repeat_interleave(lengths),
    )


def check(name: str, generation: list[Update], old: Weights, lagged: Weights, *, on_policy: bool) -> None:
    """The gradient of the first of the updates on one generation."""
    update = generation[0]
    weights = {name: value.clone().requires_grad_() for name, value in update.weights.items()}
    loss = DEFINITIONS[name][1](dense_batch(generation, weights, old, lagged), on_policy)
    want = torch.autograd.grad(loss, list(weights.values()))
    assert max(float(gradient.abs().max()) for gradient in want) > 1e-4
    for parameter, gradient in zip(weights, want, strict=True):
        torch.testing.assert_close(
            update.gradient[parameter], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def works(name: str, seen: Recorder) -> None:
    """Without selected tokens, Lp-Reg's own term would not be tested."""
    if name.startswith("lp_reg"):
        for metrics in (metrics for metrics in seen.metrics if "lpreg/kl" in metrics):
            assert metrics["lpreg/selected_fraction"] > 0.01
            assert metrics.get("lpreg/selected_one_minus_z", 1) > 0.001


def layout(name: str) -> dict[str, int]:
    """One method ranks within a micro-batch, so its restatement has a single micro-batch."""
    return MICRO if name != "lp_reg, reference" else WHOLE


@pytest.mark.parametrize("name", quick_of(DEFINITIONS, QUICK_ON_POLICY))
def test_on_policy(name: str, tmp_path: Path) -> None:
    seen = run(DEFINITIONS[name][0], tmp_path, **layout(name))
    works(name, seen)
    for update in seen.updates:
        check(name, [update], update.weights, seen.updates[0].weights, on_policy=True)


@pytest.mark.parametrize("name", quick_of(DEFINITIONS, QUICK_OFF_POLICY))
def test_several_updates_a_generation(name: str, tmp_path: Path) -> None:
    """Two halves of a generation, each seen twice."""
    size = layout(name)
    micro_batches = size.get("gradient_accumulation_steps", 1)
    seen = run(
        DEFINITIONS[name][0], tmp_path, steps=4, steps_per_generation=2 * micro_batches, num_iterations=2, **size
    )
    assert len(seen.generated_by) == 1
    works(name, seen)
    generated_by, (first, second, third, fourth) = seen.generated_by[0], seen.updates
    for generation in ([second, first], [third, fourth], [fourth, third]):
        check(name, generation, generated_by, generated_by, on_policy=False)
