"""The order of tokens under context parallelism: each token is on one rank, and all ranks have equal attention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.context import chunk_multiple, held_by


@given(st.integers(1, 8), st.lists(st.integers(0, 5), max_size=6))
def test_every_token_is_on_one_rank_and_ranks_hold_equally_many(ranks: int, units: list[int]) -> None:
    lengths = [unit * chunk_multiple(ranks) for unit in units]
    held = [held_by(rank, ranks, lengths) for rank in range(ranks)]
    assert sorted(np.concatenate(held).tolist()) == list(range(sum(lengths)))
    assert {len(part) for part in held} == {sum(lengths) // ranks}


@given(st.integers(2, 8), st.integers(1, 5))
def test_every_rank_has_the_same_amount_of_causal_attention(ranks: int, unit: int) -> None:
    length = unit * chunk_multiple(ranks)
    looks = {int((held_by(rank, ranks, [length]) + 1).sum()) for rank in range(ranks)}
    assert len(looks) == 1


def test_rank_r_holds_chunk_r_and_the_rth_from_the_end_of_every_sequence() -> None:
    assert held_by(0, 2, [8, 4]).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_by(1, 2, [8, 4]).tolist() == [2, 3, 4, 5, 9, 10]


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="6 tokens cannot be cut into 4 chunks"):
        held_by(0, 2, [4, 6])
