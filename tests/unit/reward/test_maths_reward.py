r"""Tests of the maths verifier, which compares the last \boxed{} with the label."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.reward.maths import verify_maths
from megatron_rl.types import Sample
from megatron_rl.utils.boxed import last_boxed

FIXTURE = Path(__file__).parents[2] / "fixtures" / "maths_verl.parquet"


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("34", "34"),
        (34, "34"),
        ("\\boxed{34}", "34"),
        ("34", "34."),
        ("34", "$34$"),
        ("1000", "1,000"),
        ("\\frac{1}{2}", "0.5"),
        ("1/2", "\\dfrac{1}{2}"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("[0,1)", "[0, 1)"),
        ("x=5", "5"),
        ("12\\pi", "12 \\pi"),
        ("-\\frac{2}{3}", "\\frac{-2}{3}"),
        ("\\text{Tuesday}", "\\text{Tuesday}"),
    ],
)
def test_equal_answers_score_1(make_sample: Callable[..., Sample], label: object, answer: str) -> None:
    result = verify_maths(make_sample(f"So we get \\boxed{{{answer}}}.", label))
    assert (result.score, result.answer, result.detail) == (1.0, answer, "correct")


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("34", "35"),
        ("-3", "3"),
        ("\\frac{1}{3}", "0.33"),
        ("[0,1)", "(0,1)"),
        ("(1,2)", "(2,1)"),
        ("\\{1,2\\}", "\\{1,2,3\\}"),
        ("7", "7 \\text{ or } 8"),
        ("x^2", "x^3"),
        ("\\text{Tuesday}", "\\text{Monday}"),
    ],
)
def test_different_answers_score_0(make_sample: Callable[..., Sample], label: str, answer: str) -> None:
    result = verify_maths(make_sample(f"So we get \\boxed{{{answer}}}.", label))
    assert (result.score, result.detail) == (0.0, "wrong answer")


@pytest.mark.parametrize("text", ["", "The answer is 34.", "\\boxed{34", "boxed{34}", "\\boxed{\\frac{3}{4}"])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_response_without_a_complete_box_scores_0(
    make_sample: Callable[..., Sample], text: str, finish_reason: str
) -> None:
    result = verify_maths(make_sample(text, "34", finish_reason))
    assert (result.score, result.answer, result.detail) == (0.0, None, "no box")


def test_an_empty_box_is_unreadable(make_sample: Callable[..., Sample]) -> None:
    result = verify_maths(make_sample("\\boxed{ }", "34"))
    assert (result.score, result.detail) == (0.0, "unreadable answer")


@pytest.mark.parametrize("label", [None, "", " ", "\\boxed{}", ["34"], True])
def test_a_broken_label_is_an_error(make_sample: Callable[..., Sample], label: object) -> None:
    with pytest.raises(ValueError, match="label"):
        verify_maths(make_sample("\\boxed{34}", label))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\left\\{ \\frac{1}{2} \\right.}", "\\left\\{ \\frac{1}{2} \\right."),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{\\", None),
    ],
)
def test_last_boxed_returns_the_last_complete_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


NESTED = st.recursive(
    st.text("ab1,\n ", max_size=4), lambda inner: st.lists(inner.map("{{{}}}".format), max_size=3).map("x".join)
)


@given(before=st.text("ab{}\\ "), content=NESTED, after=st.text("ab} "))
def test_last_boxed_finds_any_balanced_content(before: str, content: str, after: str) -> None:
    # A backslash right before the box would escape its own.
    assert last_boxed(f"{before} \\boxed{{{content}}}{after}") == content


def test_the_labels_of_the_fixture_verify_against_themselves(make_sample: Callable[..., Sample]) -> None:
    rows = pq.read_table(FIXTURE).to_pylist()
    assert len(rows) == 50
    for row in rows:
        label = row["reward_model"]["ground_truth"]
        assert verify_maths(make_sample(f"\\boxed{{{label}}}", label)).score == 1.0, row
        assert verify_maths(make_sample("\\boxed{-987654}", label)).score == 0.0, row
        assert row["prompt"][0]["role"] == "user"
