"""Environments of verifiers, played with the released package against the recorder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.errors import UserError
from megatron_rl.types import AgentResponse, Prompt
from tests.unit.agent.kit import TextEngines, sampling, tokenizer

pytest.importorskip("verifiers.v1")
pytestmark = pytest.mark.environments

CALL = '<tool_call>{"name": "counter_count", "arguments": {"word": "abab", "letter": "b"}}</tool_call>'
BAD_CALLS = (
    '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>',
    "<tool_call>count!</tool_call>",
    '<tool_call>{"name": "counter_count", "arguments": {"word": 3}}</tool_call>',
)


def prompts(name: str = "played", size: int = 8, seed: int = 0, **settings: Any) -> list[Prompt]:
    from megatron_rl.environments.verifiers import tasks

    rows = tasks(name, TaskSettings(size=size, seed=seed, settings=settings), False)
    return [Prompt(f"p:{i}", (1,), row.pop("prompt"), None, row) for i, row in enumerate(rows)]


def play(
    prompts: list[Prompt], answers: Callable[[str], str], *, seconds: float = 60, max_turns: int = 9, n: int = 1
) -> list[AgentResponse]:
    settings = AgentSettings(function="verifiers", timeout_seconds=seconds, max_turns=max_turns)
    before = set(os.environ)
    with AgentRollouts(settings, load_agent(settings), TextEngines(answers), tokenizer(), 20_000) as rollouts:
        groups = rollouts.generate(prompts, sampling(n))
    assert set(os.environ) == before  # no key is left behind
    found = [response for group in groups for response in group]
    assert all(isinstance(response, AgentResponse) for response in found)
    return found  # type: ignore[return-value]


def text_of(response: AgentResponse) -> str:
    return str(tokenizer().decode([*response.context, *response.token_ids]))


def test_one_turn_takes_the_environments_reward_and_records_what_was_sampled() -> None:
    chosen = prompts(size=4)
    played = play(chosen, lambda text: "aaab", n=2)
    assert len(played) == 8
    for prompt, response in zip([one for one in chosen for _ in range(2)], played, strict=True):
        letter = json.loads(prompt.metadata["task"])["letter"]
        share = {"a": 0.75, "b": 0.25}.get(letter, 0)
        assert response.reward is not None and response.reward.has_score
        assert response.reward.score == pytest.approx(0.5 * share + 0.25)
        assert response.reward.detail == f"answered 0.25, letters {share:g}"
        assert "Be short." in text_of(response) and f"Write the letter {letter}." in text_of(response)
        assert tokenizer().decode(response.token_ids[response.sampled_mask]) == "aaab<|im_end|>"


def test_several_turns_are_one_sequence() -> None:
    (response,) = play(prompts(size=1, taskset={"turns": 3}), lambda text: f"answer {text.count('assistant')}")
    assert response.turns == 3 and response.others == ()
    sampled = tokenizer().decode(response.token_ids[response.sampled_mask])
    assert sampled == "".join(f"answer {turn}<|im_end|>" for turn in (1, 2, 3))
    assert "turn 2" in tokenizer().decode(response.token_ids[~response.sampled_mask])


def test_tools_run_and_what_the_policy_does_wrong_is_an_answer_that_it_sees() -> None:
    def answers(text: str) -> str:
        asked = text.count("<|im_start|>assistant") - 1
        return [*BAD_CALLS, CALL, "bb"][asked]

    (response,) = play(prompts(size=1, taskset={"task": {"tools": True}}), answers)
    seen = tokenizer().decode(response.token_ids[~response.sampled_mask])
    assert response.turns == 5 and response.others == ()
    assert "there is no tool 'nothing'; there are counter_count" in seen
    assert "there is no tool 'malformed_tool_call'" in seen
    assert "error" in seen.lower() and "tool\n2<" in seen
    assert response.reward is not None and response.reward.has_score


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("run", "RuntimeError: the environment is gone"),
        ("reward", "the scorer is broken"),
        ("listener", "the role 'listener' is not trained, but asks the policy"),
    ],
)
def test_an_environment_that_fails_gives_no_reward(fails: str, message: str) -> None:
    (response,) = play(prompts(size=1, taskset={"fails": fails}), lambda text: "a")
    assert response.reward is not None and response.reward.outcome == "error"
    assert message in response.reward.detail


def test_an_environment_that_hangs_is_a_timeout() -> None:
    (response,) = play(prompts(size=1, taskset={"fails": "hang"}), lambda text: "a", seconds=2)
    assert response.reward is not None and response.reward.outcome == "timeout"


def test_a_limit_of_the_run_ends_the_environments_conversation() -> None:
    (response,) = play(prompts(size=1, taskset={"turns": 9}), lambda text: "b", max_turns=2)
    assert response.turns == 2
    assert response.reward is not None and response.reward.has_score  # the harness takes the limit as an end


def test_verifiers_own_limits_hold() -> None:
    (response,) = play(prompts(size=1, taskset={"turns": 9}, player={"max_turns": 3}), lambda text: "b")
    assert response.turns == 3 and response.reward is not None and response.reward.has_score


def test_the_example_is_played_to_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples/environments"))

    def bisect(text: str) -> str:
        low, high = 1, 100
        guess = 50
        for word in text.split("<|im_start|>"):
            if word.startswith("user\nHigher"):
                low = guess + 1
            elif word.startswith("user\nLower"):
                high = guess - 1
            guess = (low + high) // 2
        return str(guess)

    chosen = prompts("higher_lower", size=5, taskset={"split": "test"})
    assert all(json.loads(prompt.metadata["task"])["secret"] % 5 == 0 for prompt in chosen)
    for response in play(chosen, bisect):
        assert response.reward is not None
        assert response.reward.score == pytest.approx(0.9 ** (response.turns - 1))


def test_the_guessing_game_has_a_fifth_of_each_range_for_evaluation() -> None:
    def problems(split: str) -> set[tuple[str, int]]:
        chosen = prompts("higher_lower", size=99, taskset={"highest": 8, "ranges": 12, "split": split})
        return {(prompt.text, json.loads(prompt.metadata["task"])["secret"]) for prompt in chosen}

    train, test = problems("train"), problems("test")
    assert (len(train), len(test)) == (77, 19) and not train & test
    assert ("I think of a number from 12 to 19. Guess it: answer with a number alone.", 14) in test


def test_the_seed_chooses_the_tasks_and_errors_come_before_a_run() -> None:
    def letters(**choice: Any) -> list[str]:
        return [json.loads(prompt.metadata["task"])["letter"] for prompt in prompts(**choice)]

    assert letters(size=3) == letters(size=3) != letters(size=3, seed=1)
    assert sorted(letters(size=99)) == list("abcdefgh")
    for name, settings, message in (
        ("no_such_environment", {}, "'no_such_environment' not found"),
        ("played", {"taskset": {"fails": "load"}}, "OSError: the disk is full"),
        ("played", {"taskset": {"colour": "red"}}, "colour"),
        ("played", {"taskset": {"id": "other"}}, "data names the environment"),
    ):
        with pytest.raises(UserError, match=message):
            prompts(name, **settings)
