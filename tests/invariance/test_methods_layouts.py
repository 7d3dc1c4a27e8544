"""Every method takes the same step under every layout, on-policy and off-policy.

The selected tokens are exactly equal; loss, metrics and gradient are equal up to rounding; and a step runs no
superfluous pass through the model. The tests run the driver's own functions over real Megatron ranks, in fp32 and
without Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import ranks
from tests.hf_models import hf_model
from tests.invariance.method_steps import (
    DRAWN_BY_PLACE,
    GROUPS,
    METHODS,
    POLICIES,
    QUICK_METHODS,
    SAMPLED,
    SAMPLES,
    SEQUENCE_BY_SEQUENCE,
    TEMPERATURE,
    VARIANTS,
    VOCABULARY,
    prompts,
    run_rank,
)
from tests.tiers import chosen, quick_of

REFERENCE = "one rank"
OTHERS = quick_of((name for name in VARIANTS if name != REFERENCE), (SEQUENCE_BY_SEQUENCE, "dp2", "tp2-pp2"))
LOSS, METRIC, GRADIENT = 1e-6, 2e-5, 1e-5
"""Largest differences. Loss: absolute, as it is a mean of token losses of about 1 that mostly cancel. Other metrics:
relative to the metric, or to a tenth. Gradients: relative to the largest element of the tensor."""
ENTROPY_RANKED = ("high_entropy", "stapo", "high_entropy, reference k1", "lp_reg, highest entropy")
WITHOUT_ADVANTAGE = ("kl_cov", "grpo, reference", "high_entropy, reference k1", "entropy_bonus", "tre", "tre, top-p")
WITHOUT_ADVANTAGE += ("entropy_bonus, adapted", "tre, min-p")
"""Methods in which tokens with advantage 0 have a gradient."""
LAGGED = ("lp_reg, lagged", "lp_reg, paper, lagged", "lp_reg, no tau", "gspo, with lp_reg, full, lagged")

Found = dict[tuple[str, int], dict[str, Any]]


def write_models(folder: Path) -> PreTrainedModel:
    """Writes four policies of one shape that are close to one another, and returns the one that samples."""
    model = hf_model("qwen3", seed=0, noise=0.1, vocab_size=VOCABULARY, num_key_value_heads=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # so that distributions have a head and a tail
    model.save_pretrained(folder / "old")
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for seed, name in enumerate(policy for policy in POLICIES if policy != "old"):
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        model.save_pretrained(folder / name)
        model.load_state_dict(saved)
    return model


@torch.no_grad()
def sample(model: PreTrainedModel, folder: Path) -> None:
    """Writes the batch, sampled from the model, with log-probs that differ as an engine's do."""
    generator = torch.Generator().manual_seed(7)
    rows, log_probs = [], []
    for prompt, length in prompts():
        tokens = torch.from_numpy(prompt)
        for _ in range(length):
            log_p = (model(tokens[None]).logits[0, -1] / TEMPERATURE).log_softmax(-1)
            token = torch.multinomial(log_p.exp(), 1, generator=generator)
            tokens = torch.cat([tokens, token])
            log_probs.append(log_p[token] + 0.03 * torch.randn(1, generator=generator))
        rows.append(tokens)
    torch.save({"tokens": rows, "log_probs": torch.cat(log_probs)}, folder / SAMPLED)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """Results of each method under each layout, from one start of the processes."""
    folder = tmp_path_factory.mktemp("methods")
    sample(write_models(folder), folder)
    needed = {REFERENCE, SEQUENCE_BY_SEQUENCE, *chosen(request, "variant")}
    names = [name for name in VARIANTS if name in needed]
    methods = [method for method in METHODS if method in (chosen(request, "method") or METHODS)]
    count = max(VARIANTS[name][0].world_size for name in names)
    return ranks.run_ranks(run_rank, count, names, methods, folder)[0]


def cases(found: dict[str, Found], variant: str) -> list[tuple[str, int]]:
    """Pairs (method, updates). If sequences are shuffled, methods that depend on their order are left out."""
    drawn = DRAWN_BY_PLACE if "shuffled" in variant else ()
    return [case for case in found[variant] if case[0] not in drawn]


@pytest.mark.parametrize("variant", OTHERS)
def test_the_same_tokens_are_selected(found: dict[str, Found], variant: str) -> None:
    for case in cases(found, variant):
        same = (found[variant][case]["selected"] == found[REFERENCE][case]["selected"]).all()
        assert same, case


@pytest.mark.parametrize("variant", OTHERS)
def test_the_loss_is_the_same(found: dict[str, Found], variant: str) -> None:
    for case in cases(found, variant):
        losses = [found[which][case]["metrics"]["train/loss"] for which in (variant, REFERENCE)]
        assert losses[0] == pytest.approx(losses[1], abs=LOSS), case


@pytest.mark.parametrize("variant", OTHERS)
def test_metrics_are_the_same(found: dict[str, Found], variant: str) -> None:
    for case in cases(found, variant):
        got, expected = (found[which][case]["metrics"] for which in (variant, REFERENCE))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=METRIC, abs=METRIC / 10), (case, name)


@pytest.mark.parametrize("variant", OTHERS)
def test_the_gradient_is_the_same(found: dict[str, Found], variant: str) -> None:
    for case in cases(found, variant):
        got, expected = (found[which][case]["gradient"] for which in (variant, REFERENCE))
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            difference = (got[name] - tensor).abs().max() / tensor.abs().max()
            assert difference <= GRADIENT, (case, name, float(difference))


def test_methods_have_different_gradients(found: dict[str, Found]) -> None:
    """Otherwise the tests above would prove nothing. Off-policy only those methods agree that rank the same tokens by
    two sources."""
    same = {("lp_reg", "lp_reg, ranked by the engine")}
    off_policy = {method: step for (method, updates), step in found[REFERENCE].items() if updates == 2}
    gradients = {method: step["gradient"]["lm_head.weight"] for method, step in off_policy.items()}
    names = list(gradients)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if (first, second) not in same:
                assert (gradients[first] - gradients[second]).abs().max() > 1e-4, (first, second)


def expected_passes(method: str, updates: int, sequences: int, trained: int) -> dict[str, int]:
    """Returns the number of sequences in each pass that a step cannot do without. `trained`: those with an advantage.

    On-policy every trained sequence has a forward and a backward, and every other one a forward without gradient, for
    the metrics. Off-policy, a forward of all sequences without gradient comes first. The same holds on-policy if tokens
    are ranked by entropy, which the engine does not report. The reference scores the trained sequences.
    """
    if method in WITHOUT_ADVANTAGE:
        trained = sequences
    first = sequences if updates > 1 or method in ENTROPY_RANKED else sequences - trained
    passes = {"current": first, "train": trained}
    if "reference" in method:
        passes["reference"] = trained
    return {what: count for what, count in passes.items() if count}


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("method", quick_of(METHODS, QUICK_METHODS))
def test_no_pass_through_the_model_is_superfluous(found: dict[str, Found], method: str, updates: int) -> None:
    """Each micro-batch is one sequence here, so that forwards and backwards count sequences."""
    ran = found[SEQUENCE_BY_SEQUENCE][method, updates]["passes"]
    for one in ran:
        assert one["forwards"] == one["rows"], one
        assert one["backwards"] == (one["rows"] if one["what"] == "train" else 0), one
    rows = {what: sum(one["rows"] for one in ran if one["what"] == what) for what in [one["what"] for one in ran]}
    if method in LAGGED:
        assert 0 < rows.pop("lagged") < GROUPS * SAMPLES / 2
    assert rows == expected_passes(method, updates, GROUPS * SAMPLES, (GROUPS - 2) * SAMPLES)
    calls = [one["what"] for one in ran]
    assert calls.count("train") == updates
    assert all(calls.count(what) <= 1 for what in calls if what != "train")
