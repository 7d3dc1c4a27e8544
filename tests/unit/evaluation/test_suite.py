from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.rows import Rows
from megatron_rl.evaluation.suite import accuracy, follows, pass_at_k, probe_rows
from megatron_rl.types import FinishReason, Generation, Prompt, RewardResult, Sample


def sample(group: int, score: float | None, length: int = 3, reason: FinishReason = "stop") -> Sample:
    return Sample(
        prompt=Prompt(id=f"suite:{group}", token_ids=(1,), text="", label=None),
        group=group,
        generation=Generation([5] * length, [-1.0] * length, reason, 0),
        text="",
        reward=None if score is None else RewardResult(score),
    )


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(combinations([i < correct for i in range(samples)], k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_more_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples, there are 2"):
        pass_at_k(2, 1, 3)


def test_accuracy_is_a_mean_over_prompts() -> None:
    samples = [
        *(sample(0, score, length=2) for score in (1, 0, 0, 0)),
        *(sample(1, 0, length=4, reason="length") for _ in range(4)),
        *(sample(2, 1, length=6) for _ in range(4)),
    ]
    found = accuracy(samples, 4)
    assert found == pytest.approx(
        {"avg@4": (0.25 + 0 + 1) / 3, "pass@4": 2 / 3, "response_length": 4, "truncated_fraction": 1 / 3}
    )
    assert accuracy(samples, 2)["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)


def test_a_sample_without_a_grade_is_refused() -> None:
    with pytest.raises(ValueError, match="suite:1 was not graded"):
        accuracy([sample(0, 1), sample(1, None)], 1)


AFTER, TOKEN = 1, 2
token_rows = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
    max_size=6,
)


@given(token_rows)
def test_probes_find_every_place_and_no_other(pairs: list[tuple[list[int], list[int]]]) -> None:
    lengths = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)
    rows = Rows([np.array(prompt + response, dtype=np.int64) for prompt, response in pairs], lengths)
    places = [
        [(prompt + response)[i - 1] == AFTER for i in range(len(prompt), len(prompt + response))]
        for prompt, response in pairs
    ]
    assert follows(rows, AFTER).tolist() == [place for row in places for place in row]

    part, where = probe_rows(rows, AFTER, TOKEN)
    chosen = [i for i, row in enumerate(places) if any(row)]
    assert [row.tolist() for row in part.tokens] == [rows.tokens[i].tolist() for i in chosen]
    assert where.tolist() == [place for i in chosen for place in places[i]]
    assert part.values["probe_targets"].tolist() == [TOKEN] * part.num_response_tokens
