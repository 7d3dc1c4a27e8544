"""The grader `published`: an answer is right if any of the paper's three rules accepts it, its mistakes included."""

from collections.abc import Callable

import pytest

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward.maths import MathsReward
from megatron_rl.types import Sample

REWARD = MathsReward(RewardSettings(name="math", math={"grader": "published"}))


@pytest.mark.parametrize(
    ("label", "answer", "rule"),
    [
        ("34", "34", "mathd"),
        (r"\frac{1}{2}", "1/2", "mathd"),
        (r"\frac{1}{2}", "0.5", "mathd"),
        (r"5\text{ cm}", "5", "mathd"),
        (r"90^\circ", "90", "mathd"),
        ("x=5", "5", "mathd"),
        (r"\text{Evelyn}", "evelyn", "sympy"),
        (r"3\sqrt{13}", r"\sqrt{117}", "sympy"),
        ("x^2+2x+1", "(x+1)^2", "sympy"),
        ("1,234", "1234", "sympy"),
        (r"\{1,2\}", "2,1", "math-verify"),
        (r"\frac{2}{4}", r"\frac{1}{2}", "math-verify"),
        # Wrong answers that the published code rewards.
        ("34", r"34\text{ thirds}", "mathd"),
        ("a<b<c", "c<b<a", "mathd"),
        ("1e-9", "2e-9", "sympy"),
        (r"\sqrt[3]{16}", r"\sqrt{16}", "sympy"),
        ("f(2)=5", "f(2)=6", "math-verify"),
    ],
)
def test_the_first_rule_that_accepts_is_named(
    make_sample: Callable[..., Sample], label: str, answer: str, rule: str
) -> None:
    result = REWARD(make_sample(rf"\boxed{{{answer}}}", label))
    assert (result.score, result.detail) == (1.0, f"correct ({rule})")


@pytest.mark.parametrize(
    ("label", "answer"),
    [("34", "35"), ("(1,2)", "(2,1)"), (r"\sqrt{2}", "1.41"), ("x+1", "x+2"), (r"\text{east}", r"\text{west}x")],
)
def test_other_answers_score_0(make_sample: Callable[..., Sample], label: str, answer: str) -> None:
    assert REWARD(make_sample(rf"\boxed{{{answer}}}", label)).score == 0.0


@pytest.mark.parametrize("text", ["34", r"\boxed{34", r"\boxed{34} or rather \boxed{34", r"\boxed {34}"])
def test_an_incomplete_last_box_is_no_box(make_sample: Callable[..., Sample], text: str) -> None:
    result = REWARD(make_sample(text, "34"))
    assert (result.score, result.detail) == (0.0, "no box")


def test_nothing_in_an_answer_is_executed(make_sample: Callable[..., Sample], tmp_path: object) -> None:
    answer = f'__import__("pathlib").Path("{tmp_path}/mark").touch()'
    assert REWARD(make_sample(rf"\boxed{{{answer}}}", "34")).score == 0.0
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]
