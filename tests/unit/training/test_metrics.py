from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lpreg import Selection, SelectionRule
from lpreg.selection import SelectionKind
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.metrics import loss_metrics, policy_metrics, rollout_metrics, selection_metrics
from megatron_rl.types import FinishReason, Prompt, Response, RewardResult

NAN = float("nan")


def group(number: int, *samples: tuple[float, int, FinishReason]) -> Group:
    """`samples`: (score, sampled tokens, finish reason) of each. Each response has three tokens of a tool besides."""
    masks = [[True] * length + [False] * 3 for _, length, _ in samples]
    responses = tuple(
        Response([2] * len(mask), [0.0] * len(mask), reason, 0, sampled_mask=mask)
        for mask, (_, _, reason) in zip(masks, samples, strict=True)
    )
    prompt = Prompt(id=str(number), token_ids=(1,), text="", label=None)
    return Group(number, number, prompt, 0, responses, tuple(RewardResult(score) for score, _, _ in samples))


def test_rollout_metrics() -> None:
    """Groups that are not trained on count as well."""
    groups = [group(0, (1, 2, "stop"), (0, 4, "stop")), group(1, (1, 6, "length"), (1, 8, "stop"))]
    rollouts = Rollouts(groups, np.array([True, False]), weight_version=0, drops_groups=True)
    found = rollout_metrics(rollouts, np.array([1.0, -1.0]))
    assert found == pytest.approx(
        {
            "reward/mean": 0.75,
            "reward/std": math.sqrt(3) / 4,
            "reward/zero_advantage_fraction": 0.5,
            "response_length/mean": 5,
            "response_length/max": 8,
            "response_length/truncated_fraction": 0.25,
        }
    )


def batch() -> SequenceBatch:
    """Responses of 2, 1 and 3 tokens."""
    rows = SequenceBatch.of([range(3), range(3), range(5)], [1, 2, 2])
    return rows.with_values(rollout_log_probs=np.array([-1, -1, -2, -3, -3, -3], dtype=np.float32))


def test_policy_metrics() -> None:
    found = policy_metrics(
        batch(),
        {
            "entropy": np.array([1, 3, 2, 0, 1, 5]),
            "log_probs": np.array([-1, -1.5, -2, -3, -3, -2]),
            "in_filter": np.array([True, True, False, True, True, False]),
            "log_z": np.log([1, 1, 0.5, 1, 0.75, 0.75]),
        },
        np.array([True, True, True, True, False, False]),
    )
    assert found == pytest.approx(
        {
            "entropy/token_mean": 2.0,
            "entropy/sequence_mean": 2.0,  # of 2, 2 and 2
            "lpreg/kept_fraction": 4 / 6,
            "lpreg/one_minus_z": 1 / 6,
            "logprob/rollout_actor_abs_diff": 0.25,
            "logprob/rollout_actor_max_diff": 1.0,
            "logprob/fresh_abs_diff": 0.125,
        }
    )


def test_tokens_that_the_actor_did_not_score_do_not_count() -> None:
    found = policy_metrics(
        batch(),
        {
            "entropy": np.array([NAN, NAN, 4, 0, 1, 5], dtype=np.float32),
            "log_probs": np.array([NAN, NAN, -2, -3, -3, -2], dtype=np.float32),
            "in_filter": np.array([NAN, NAN, 0, 1, 1, 0], dtype=np.float32),
            "log_z": np.array([NAN, NAN, np.log(0.5), 0, 0, 0], dtype=np.float32),
        },
        np.array([True, True, True, True, True, False]),
    )
    assert found == pytest.approx(
        {
            "entropy/token_mean": 2.5,
            "entropy/sequence_mean": 3.0,  # of 4 and 2; the first sequence was not scored
            "lpreg/kept_fraction": 0.5,
            "lpreg/one_minus_z": 0.125,
            "logprob/rollout_actor_abs_diff": 0.25,
            "logprob/rollout_actor_max_diff": 1.0,
            "logprob/fresh_abs_diff": 0.0,
        }
    )


@pytest.mark.filterwarnings("error")
def test_without_scores_there_are_no_policy_metrics() -> None:
    assert policy_metrics(batch(), {}, np.zeros(6, dtype=bool)) == {}
    unknown = dict.fromkeys(("entropy", "log_probs", "in_filter", "log_z"), np.full(6, NAN, dtype=np.float32))
    assert policy_metrics(batch(), unknown, np.ones(6, dtype=bool)) == {}


def test_older_tokens_alone_have_no_fresh_gap() -> None:
    scores = dict.fromkeys(("entropy", "log_probs", "in_filter", "log_z"), np.zeros(6))
    found = policy_metrics(batch(), scores, np.zeros(6, dtype=bool))
    assert "logprob/rollout_actor_abs_diff" in found and "logprob/fresh_abs_diff" not in found


def test_loss_metrics() -> None:
    parts = {
        "ratio": (6.0, 6.0),
        "clip_fraction": (3.0, 6.0),
        "selected_fraction": (2.0, 6.0),
        "lp_reg_selected_fraction": (3.0, 6.0),
        "candidate_kept_fraction": (1.0, 2.0),
        "kl": (0.5, 2.0),
        "clamped_fraction": (0.0, 0.0),
        "rarity/positive/0/weight": (0.0, 0.0),  # left out: a mean over no tokens is not 0
        "rarity/positive/0.1/weight": (3.0, 2.0),
    }
    assert loss_metrics(parts, 10) == {
        "train/ratio": 1.0,
        "train/clip_fraction": 0.5,
        "lpreg/lp_reg_selected_fraction": 0.3,
        "lpreg/selected_fraction": 0.2,  # of the whole batch's tokens, dropped sequences included
        "lpreg/candidate_kept_fraction": 0.5,
        "lpreg/kl": 0.25,
        "lpreg/clamped_fraction": 0.0,
        "lpreg/rarity/positive/0.1/weight": 1.5,
    }


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("lowest_log_prob", {"lpreg/delta": 0.25, "lpreg/below_delta_fraction": 0.1}),
        ("highest_entropy", {"lpreg/entropy_threshold": math.log(0.25)}),
        ("highest_covariance", {"lpreg/covariance_threshold": math.log(0.25)}),
        ("random", {}),
    ],
)
def test_selection_metrics(kind: SelectionKind, want: dict[str, float]) -> None:
    selection = Selection(math.log(0.25), torch.ones(2, dtype=torch.bool), count=2, population=20)
    assert selection_metrics(SelectionRule(kind=kind, fraction=0.1), selection) == pytest.approx(want)


@pytest.mark.parametrize("kind", ["lowest_log_prob", "highest_entropy", "highest_covariance", "random"])
def test_a_selection_from_no_tokens_has_no_metrics(kind: SelectionKind) -> None:
    nothing = Selection(-math.inf, torch.zeros(0, dtype=torch.bool), count=0, population=0)
    assert selection_metrics(SelectionRule(kind=kind, fraction=0.1), nothing) == {}
