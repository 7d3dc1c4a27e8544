from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.types import Generation


def piece(version: int, length: int, first: int) -> Generation:
    tokens = list(range(first, first + length))
    return Generation(tokens, [-float(token) for token in tokens], "abort", version)


def test_versions_of_a_response_sampled_by_two() -> None:
    whole = piece(3, 2, 0).followed_by(piece(5, 3, 2))
    assert (whole.weight_version, whole.version_changes) == (3, ((2, 5),))
    assert whole.weight_versions == [3, 3, 5, 5, 5]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6))
def test_pieces_add_up_whatever_their_lengths(parts: list[tuple[int, int]]) -> None:
    whole, expected = piece(*parts[0], first=0), [parts[0][0]] * parts[0][1]
    for version, length in parts[1:]:
        whole = whole.followed_by(piece(version, length, len(expected)))
        expected += [version] * length
    assert whole.weight_versions == expected
    assert whole.token_ids == list(range(len(expected)))
    assert whole.log_probs == [-float(token) for token in whole.token_ids]
