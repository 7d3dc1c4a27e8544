"""Tests of the Countdown verifier: every solution scores 1, and everything else scores 0."""

from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rl.data.countdown.problems import Problem, all_problems, attempts, label, solutions
from megatron_rl.data.countdown.traces import MIX_A, traces
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.types import Sample

SOLVED = "3 * 5 = 15 + 7 = 22"
LABEL = "3 5 7 > 22"
PROBLEMS = all_problems()


@pytest.mark.parametrize(
    ("text", "answer", "detail"),
    [
        (f"{SOLVED} ok", SOLVED, "correct"),
        (f"{SOLVED} ok hmm", SOLVED, "correct"),
        (f"3 + 5 = 8 + 7 = 15 no wait {SOLVED} ok so", SOLVED, "correct"),
        (f"{SOLVED} ok wait 7 + 3 = 10 + 5 = 15 no", "7 + 3 = 10 + 5 = 15", "verdict is no"),
        (f"{SOLVED} no", SOLVED, "verdict is no"),
        (f"{SOLVED} no hmm", SOLVED, "verdict is no"),
        (SOLVED, SOLVED, "no verdict"),
        (f"{SOLVED} ok wait", SOLVED, "no verdict"),
        (f"{SOLVED} ok hmm so", SOLVED, "no verdict"),
        (f"{SOLVED} ok 5", "5", "no verdict"),
        ("3 + 5 = 8 + 7 = 15 ok", "3 + 5 = 8 + 7 = 15", "wrong target"),
        ("3 * 5 = 16 + 6 = 22 ok", "3 * 5 = 16 + 6 = 22", "wrong arithmetic"),
        ("3 - 5 = 0 + 7 = 7 ok", "3 - 5 = 0 + 7 = 7", "wrong arithmetic"),
        ("3 * 5 = 15 + 6 = 21 ok", "3 * 5 = 15 + 6 = 21", "wrong numbers"),
        ("7 * 3 = 21 + 1 = 22 ok", "7 * 3 = 21 + 1 = 22", "wrong numbers"),
        ("3 * 5 = 15 ok", "3 * 5 = 15", "malformed attempt"),
        (f"{SOLVED} + 0 = 22 ok", f"{SOLVED} + 0 = 22", "malformed attempt"),
        (f"{SOLVED} no wait ok", SOLVED, "correct"),
        ("ok", None, "no attempt"),
        ("hmm", None, "no verdict"),
        ("", None, "no verdict"),
    ],
)
def test_score_answer_and_detail_of_a_response(
    make_sample: Callable[..., Sample], text: str, answer: str | None, detail: str
) -> None:
    result = verify_countdown(make_sample(text, LABEL))
    assert (result.score, result.answer, result.detail) == (float(detail == "correct"), answer, detail)


def test_an_intermediate_result_above_80_is_wrong(make_sample: Callable[..., Sample]) -> None:
    result = verify_countdown(make_sample("9 * 9 = 81 - 1 = 80 ok", "1 9 9 > 80"))
    assert (result.score, result.detail) == (0.0, "wrong arithmetic")


@pytest.mark.parametrize(("reason", "detail"), [("length", "truncated"), ("abort", "aborted")])
def test_an_unfinished_response_scores_0(make_sample: Callable[..., Sample], reason: str, detail: str) -> None:
    result = verify_countdown(make_sample(f"{SOLVED} ok", LABEL, reason))
    assert (result.score, result.detail) == (0.0, detail)


@pytest.mark.parametrize("label", [None, 22, "", "3 5 > 22", "3 5 7 22", "3 5 7 > ", "a b c > 22", ["3", "5", "7"]])
def test_a_broken_label_is_an_error(make_sample: Callable[..., Sample], label: object) -> None:
    with pytest.raises(ValueError, match="3 5 7 > 22"):
        verify_countdown(make_sample(f"{SOLVED} ok", label))


@given(problem=st.sampled_from(PROBLEMS), data=st.data())
def test_every_solution_scores_1(make_sample: Callable[..., Sample], problem: Problem, data: st.DataObject) -> None:
    solution = data.draw(st.sampled_from(solutions(problem.numbers, problem.target)))
    order = tuple(data.draw(st.permutations(problem.numbers)))
    assert verify_countdown(make_sample(f"{solution.text} ok", label(order, problem.target))).score == 1.0


@given(problem=st.sampled_from(PROBLEMS), data=st.data())
def test_a_changed_word_scores_0(make_sample: Callable[..., Sample], problem: Problem, data: st.DataObject) -> None:
    """Changes that give another solution, such as `x + 0` for `x - 0`, are excluded."""
    words = [*data.draw(st.sampled_from(solutions(problem.numbers, problem.target))).text.split(), "ok"]
    place = data.draw(st.integers(0, len(words) - 1))
    word = data.draw(st.sampled_from(["+", "-", "*", "=", "no", "wait", "<pad>", *map(str, range(81))]))
    words[place] = word
    text = " ".join(words)
    assume(text.removesuffix(" ok") not in {solution.text for solution in solutions(problem.numbers, problem.target)})
    assert verify_countdown(make_sample(text, label(problem.numbers, problem.target))).score == 0.0


@given(problem=st.sampled_from(PROBLEMS), data=st.data())
def test_only_the_last_attempt_counts(
    make_sample: Callable[..., Sample], problem: Problem, data: st.DataObject
) -> None:
    tries = data.draw(st.lists(st.sampled_from(attempts(problem.numbers)), min_size=1, max_size=4))
    text = " wait ".join(f"{attempt.text} {'ok' if attempt.result == problem.target else 'no'}" for attempt in tries)
    result = verify_countdown(make_sample(text, label(problem.numbers, problem.target)))
    assert (result.score, result.answer) == (float(tries[-1].result == problem.target), tries[-1].text)


def test_the_verifier_agrees_with_the_verdicts_of_warm_start_traces(make_sample: Callable[..., Sample]) -> None:
    columns = traces(PROBLEMS, 400, MIX_A, seed=1)
    for prompt, response in zip(columns["prompt"], columns["response"], strict=True):
        text = response.removesuffix(" <eos>")
        verdict = next(word for word in reversed(text.split()) if word in ("ok", "no"))
        result = verify_countdown(make_sample(text, prompt.removeprefix("<bos> ").removesuffix(" :")))
        assert result.score == (1.0 if verdict == "ok" else 0.0), (prompt, response, result)
