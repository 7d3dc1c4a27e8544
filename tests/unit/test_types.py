from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.types import Response


def piece(version: int, mask: list[bool], first: int) -> Response:
    tokens = list(range(first, first + len(mask)))
    return Response(tokens, [-float(token) for token in tokens], "abort", version, sampled_mask=mask)


def test_lists_become_arrays_and_every_token_is_sampled_by_default() -> None:
    response = Response([5, 6], [-0.5, -0.25], "stop", 3)
    assert [array.dtype for array in (response.token_ids, response.log_probs, response.sampled_mask)] == [
        np.int32,
        np.float32,
        np.bool_,
    ]
    assert response.token_ids.tolist() == [5, 6] and response.sampled_mask.tolist() == [True, True]
    assert (len(response), response.num_sampled_tokens) == (2, 2)


def test_arrays_of_the_right_type_are_not_copied() -> None:
    ids, log_probs, mask = np.arange(3, dtype=np.int32), np.zeros(3, np.float32), np.array([True, False, True])
    response = Response(ids, log_probs, "stop", 0, sampled_mask=mask)
    assert response.token_ids is ids and response.log_probs is log_probs and response.sampled_mask is mask
    assert (len(response), response.num_sampled_tokens) == (3, 2)


def test_a_source_without_log_probs_has_none() -> None:
    response = Response([1, 2], [], "length", 0)
    assert len(response) == 2 and response.log_probs.shape == (0,)


@pytest.mark.parametrize(
    ("log_probs", "mask", "words"),
    [
        ([0.0], None, "2 tokens, 1 log-probs and 2 mask values"),
        ([0.0] * 3, None, "2 tokens, 3 log-probs and 2 mask values"),
        ([0.0, 0.0], [True], "2 tokens, 2 log-probs and 1 mask values"),
        ([], [True] * 3, "2 tokens, 0 log-probs and 3 mask values"),
    ],
)
def test_arrays_of_other_lengths_are_refused(log_probs: list[float], mask: list[bool] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Response([1, 2], log_probs, "stop", 0, sampled_mask=mask)


RESPONSE = Response([1, 2], [-0.5, 0.0], "stop", 3, ((1, 4),), [True, False])


@pytest.mark.parametrize(
    "other",
    [
        Response([1, 3], [-0.5, 0.0], "stop", 3, ((1, 4),), [True, False]),
        Response([1, 2], [-0.25, 0.0], "stop", 3, ((1, 4),), [True, False]),
        Response([1, 2], [], "stop", 3, ((1, 4),), [True, False]),
        Response([1, 2], [-0.5, 0.0], "length", 3, ((1, 4),), [True, False]),
        Response([1, 2], [-0.5, 0.0], "stop", 2, ((1, 4),), [True, False]),
        Response([1, 2], [-0.5, 0.0], "stop", 3, (), [True, False]),
        Response([1, 2], [-0.5, 0.0], "stop", 3, ((1, 4),)),
        "no response",
    ],
)
def test_responses_differ_if_any_part_differs(other: object) -> None:
    assert other != RESPONSE
    assert Response([1, 2], [-0.5, 0.0], "stop", 3, ((1, 4),), [True, False]) == RESPONSE


def test_a_pickled_response_is_the_same() -> None:
    again = pickle.loads(pickle.dumps(RESPONSE))
    assert again == RESPONSE and again.token_ids.dtype == np.int32


def test_versions_of_a_response_sampled_by_two() -> None:
    joined = piece(3, [True] * 2, 0).followed_by(piece(5, [True] * 3, 2))
    assert (joined.weight_version, joined.version_changes) == (3, ((2, 5),))
    assert joined.weight_versions.tolist() == [3, 3, 5, 5, 5]


WITH, WITHOUT, EMPTY = Response([1], [-0.5], "abort", 0), Response([2], [], "stop", 0), Response([], [], "abort", 0)


@pytest.mark.parametrize(
    ("first", "rest", "log_probs"),
    [
        (WITH, WITH, [-0.5, -0.5]),
        (WITH, WITHOUT, []),
        (WITHOUT, WITH, []),
        (WITHOUT, WITHOUT, []),
        (WITH, EMPTY, [-0.5]),
        (EMPTY, WITH, [-0.5]),
    ],
)
def test_a_joined_response_has_log_probs_if_both_parts_have(
    first: Response, rest: Response, log_probs: list[float]
) -> None:
    joined = first.followed_by(rest)
    assert joined.log_probs.tolist() == log_probs and joined.log_probs.dtype == np.float32
    assert len(joined) == len(first) + len(rest)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.booleans(), max_size=4)), min_size=1, max_size=6))
def test_pieces_add_up_whatever_their_lengths_and_masks(parts: list[tuple[int, list[bool]]]) -> None:
    joined, expected = piece(*parts[0], first=0), [parts[0][0]] * len(parts[0][1])
    for version, mask in parts[1:]:
        joined = joined.followed_by(piece(version, mask, len(expected)))
        expected += [version] * len(mask)
    assert joined.weight_versions.tolist() == expected
    assert joined.token_ids.tolist() == list(range(len(expected)))
    assert joined.log_probs.tolist() == [-float(token) for token in joined.token_ids]
    assert joined.sampled_mask.tolist() == [sampled for _, mask in parts for sampled in mask]
    assert joined.token_ids.dtype == np.int32 and joined.sampled_mask.dtype == np.bool_
    runs = joined.version_runs
    assert all(end > start for start, end, _ in runs) or not expected
    assert [version for start, end, version in runs for _ in range(end - start)] == expected
