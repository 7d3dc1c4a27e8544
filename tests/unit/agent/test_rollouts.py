"""Rollouts of agents: limits, failures and cancellation, many at a time; nothing is lost and nothing stays behind."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from megatron_rl.agent import rollouts as module
from megatron_rl.agent.model import Model
from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.agent.session import LimitReached
from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.reward import RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward.agent import no_reward
from megatron_rl.reward.decode import decoder_of, text_of
from megatron_rl.reward.grading import Grading
from megatron_rl.types import Prompt, RewardResult, Sample
from tests.unit.agent.kit import TextEngines, sampling, tokenizer
from tests.unit.rollout.test_collector import collector_of

PROMPT = Prompt("p", (5, 6), "ab", "ok")


class SlowServers(TextEngines):
    """Servers that never answer a prompt with the word `never`."""

    def __init__(self) -> None:
        super().__init__(lambda text: "ok", embedded=False)
        self.answered: set[int] = set()

    def submit(self, prompts: Any, sampling: Any, partial: Any = None) -> list[int]:
        numbers = super().submit(prompts, sampling)
        texts = (tokenizer().decode(list(prompt.token_ids)) for prompt in prompts)
        self.answered |= {number for number, text in zip(numbers, texts, strict=True) if "never" not in text}
        return numbers

    def wait(self, ids: Any, seconds: float | None = None) -> set[int]:
        time.sleep(0.01)
        return super().wait(set(ids) & self.answered)

    def cancel(self, ids: Any) -> None:
        for number in list(ids):
            del self.asked[number]
            self.cancelled.append(number)


def rollouts_of(agent: Any, engines: TextEngines, **settings: Any) -> AgentRollouts:
    own = AgentSettings(function="my:agent", **settings)
    return AgentRollouts(own, agent, engines, tokenizer(), sequence_tokens=5000)


def one(agent: Any, answers: Callable[[str], str] = lambda text: "ok", max_tokens: int = 1000, **settings: Any) -> Any:
    """The response of a single rollout."""
    with rollouts_of(agent, TextEngines(answers), **settings) as rollouts:
        ((response,),) = rollouts.generate([PROMPT], sampling(1, max_tokens))
    return response


async def talk(model: Model, prompt: Prompt, turns: int = 3) -> float:
    messages = [{"role": "user", "content": prompt.text}]
    for _ in range(turns):
        messages += [await model.chat(messages), {"role": "user", "content": "the"}]
    return 0.5


def test_the_reward_of_the_agent_counts_and_the_verifier_grades_the_others() -> None:
    class Verifier:
        def score(self, samples: Any) -> list[RewardResult]:
            return [RewardResult(1.0, detail="verified", text=sample.text) for sample in samples]

    async def graded_elsewhere(model: Model, prompt: Prompt) -> None:
        await talk(model, prompt)

    responses = [one(talk), one(graded_elsewhere)]
    grading = Grading(Verifier(), RewardSettings(name="agent"))  # type: ignore[arg-type]
    own, verified = grading.grade([(PROMPT, response) for response in responses])
    assert (own.score, verified.score) == (0.5, 1.0)
    samples = [Sample(PROMPT, response) for response in (responses[1], one(graded_elsewhere, graded="transcript"))]
    assert [text_of(sample, decoder_of(tokenizer())).count("ok") for sample in samples] == [1, 3]
    assert own.text == "ok" and own.outcome == "score"  # the last of three answers


@pytest.mark.parametrize(
    ("limits", "max_tokens", "sampled"), [({"max_turns": 2}, 1000, 2 * 3), ({}, 4, 4), ({"max_turns": 1}, 1000, 3)]
)
def test_a_rollout_at_its_limit_is_a_truncated_response(limits: Any, max_tokens: int, sampled: int) -> None:
    """An answer has three tokens, the end token included."""
    response = one(talk, max_tokens=max_tokens, **limits)
    assert response.reward is None and response.finish_reason == "length"
    assert response.num_sampled_tokens == sampled


def test_failures_are_counted_outcomes() -> None:
    async def fails(model: Model, prompt: Prompt) -> float:
        await model.chat([{"role": "user", "content": "ab"}])
        return 1 / 0

    async def ends_itself(model: Model, prompt: Prompt) -> None:
        sys.exit(3)

    async def says_nothing(model: Model, prompt: Prompt) -> float:
        return "good"  # type: ignore[return-value]

    async def never_asks(model: Model, prompt: Prompt) -> None:
        pass

    async def asks_too_long(model: Model, prompt: Prompt) -> None:
        await model.generate([5] * 6000)

    async def hangs(model: Model, prompt: Prompt) -> None:
        await model.chat([{"role": "user", "content": "ab"}])
        await asyncio.sleep(1e6)

    async def asks_wrongly(model: Model, prompt: Prompt) -> None:
        await model.chat([{"role": "user", "content": [{"type": "image_url"}]}])

    expected = {
        fails: ("error", "ZeroDivisionError"),
        ends_itself: ("error", "SystemExit(3)"),
        says_nothing: ("error", "not a number"),
        never_asks: ("error", "has not called the model"),
        asks_too_long: ("error", "reached a limit before its first token"),
        hangs: ("timeout", "rollout.agent.timeout_seconds"),
        asks_wrongly: ("error", "images and sound are not supported"),
    }
    for agent, (outcome, detail) in expected.items():
        response = one(agent, timeout_seconds=0.3 if agent is hangs else 600.0)
        assert response.reward.outcome == outcome, agent
        assert detail in response.reward.detail
    assert "test_rollouts.py, line" in one(fails).reward.detail
    assert one(fails).num_sampled_tokens == 3


class WithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error", [WithoutText(), ValueError("a" * 10**7), GeneratorExit(), asyncio.CancelledError(), ValueError("\ud800")]
)
def test_whatever_an_agent_raises_costs_its_rollout_only(error: BaseException) -> None:
    async def raises(model: Model, prompt: Prompt) -> float:
        await model.chat([{"role": "user", "content": "ab"}])
        raise error

    reward = one(raises).reward
    assert reward.outcome == "error" and reward.detail.startswith(type(error).__name__) and len(reward.detail) < 3000


@pytest.mark.parametrize("content", ["ab", 3], ids=["after a limit", "bad request"])
def test_an_agent_that_repeats_a_refused_call_for_ever_takes_too_long(content: Any) -> None:
    async def insists(model: Model, prompt: Prompt) -> float:
        while True:
            try:
                await model.chat([{"role": "user", "content": content}])
            except Exception:
                continue

    assert one(insists, max_turns=1, timeout_seconds=0.5).reward.outcome == "timeout"


def test_only_the_limit_itself_makes_a_truncated_response_and_other_errors_after_it_count() -> None:
    async def fails_after_the_limit(model: Model, prompt: Prompt) -> float:
        try:
            return await talk(model, prompt)
        except LimitReached:
            return 1 / 0

    async def handles_the_limit(model: Model, prompt: Prompt) -> float:
        try:
            return await talk(model, prompt)
        except LimitReached:
            return 0.25

    async def leaves_it_to_the_verifier(model: Model, prompt: Prompt) -> None:
        await handles_the_limit(model, prompt)

    async def in_a_task_group(model: Model, prompt: Prompt) -> float:
        async with asyncio.TaskGroup() as group:
            group.create_task(talk(model, prompt))
        return 1.0

    failed = one(fails_after_the_limit, max_turns=2)
    assert failed.reward.outcome == "error" and "ZeroDivisionError" in failed.reward.detail
    handled = one(handles_the_limit, max_turns=2)
    assert handled.reward.score == 0.25 and handled.finish_reason == "stop"
    assert one(handles_the_limit, max_tokens=4).finish_reason == "length"  # its last answer is cut
    for agent in (leaves_it_to_the_verifier, in_a_task_group):
        response = one(agent, max_turns=2)
        assert response.reward is None and response.finish_reason == "length"


def test_what_a_policy_does_wrongly_with_tools_is_seen_by_it_in_the_same_sequence() -> None:
    def half(number: float) -> float:
        """Halves a number.

        Args:
            number: The number.
        """
        return 1 / number

    wrong = [
        ("{not JSON", "error: the tool call is not JSON"),
        ('{"name": "g", "arguments": {}}', "error: there is no tool 'g'; there are half"),
        ('{"name": "half", "arguments": {"x": 1}}', "error: wrong arguments for half"),
        ('{"name": "half", "arguments": {"number": 0}}', "error: ZeroDivisionError"),
        ('{"name": "half", "arguments": {"number": 2}}', "0.5"),
    ]

    def policy(text: str) -> str:
        turn = text.count("<|im_start|>tool")
        return f"<tool_call>{wrong[turn][0]}</tool_call>" if turn < len(wrong) else "ok"

    async def agent(model: Model, prompt: Prompt) -> float:
        answer = await model.use_tools([{"role": "user", "content": "ab"}], [half])
        return float(answer["content"] == "ok")

    response = one(agent, policy)
    assert response.reward.score == 1.0 and response.others == () and response.turns == len(wrong) + 1
    seen = tokenizer().decode(response.token_ids[~response.sampled_mask].tolist())
    assert [words for _, words in wrong if words not in seen] == []


def test_an_agent_that_should_give_the_reward_and_returns_none_has_failed() -> None:
    async def forgets(model: Model, prompt: Prompt) -> None:
        await talk(model, prompt)

    def graded(**limits: Any) -> RewardResult:
        response = one(forgets, **limits)
        text = tokenizer().decode(response.token_ids.tolist())
        return no_reward(Sample(PROMPT, response, text))

    forgotten = graded()
    assert forgotten.outcome == "error" and "returns no score" in forgotten.detail
    assert graded(max_turns=2) == RewardResult(0.0, detail="truncated")


def test_an_agent_that_ignores_its_cancellation_gets_no_more_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLEAN_UP_SECONDS", 0.2)
    refused: list[str] = []

    async def stubborn(model: Model, prompt: Prompt) -> float:
        while True:
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                try:
                    await model.chat([{"role": "user", "content": "ab"}])
                except Exception as error:
                    refused.append(type(error).__name__)

    response = one(stubborn, timeout_seconds=0.1)
    assert response.reward.outcome == "timeout" and response.num_sampled_tokens == 0
    assert set(refused) == {"SessionClosed"}


def test_an_embedded_engine_gets_the_calls_of_one_moment_in_one_batch() -> None:
    engines = TextEngines(lambda text: "ok")
    with rollouts_of(talk, engines) as rollouts:
        groups = rollouts.generate([PROMPT, PROMPT], sampling(4))
    assert engines.batches == [8, 8, 8]
    assert [len(group) for group in groups] == [4, 4]


def test_a_thousand_rollouts_need_no_thread_each() -> None:
    threads: set[threading.Thread] = set()

    async def agent(model: Model, prompt: Prompt) -> float:
        threads.update(threading.enumerate())
        return await talk(model, prompt, turns=2)

    before = set(threading.enumerate())  # some of other tests, which may end meanwhile
    with rollouts_of(agent, TextEngines(lambda text: "ok", embedded=False)) as rollouts:
        (group,) = rollouts.generate([PROMPT], sampling(1000))
    assert len(group) == 1000 and all(response.reward.score == 0.5 for response in group)  # type: ignore[attr-defined]
    assert [thread.name for thread in threads - before] == ["agents"]
    assert set(threading.enumerate()) <= before


def test_an_address_that_is_not_ours_is_an_error_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with (
        pytest.raises(UserError, match=r"rollout\.agent\.host: cannot listen on 192\.0\.2\.1"),
        rollouts_of(talk, TextEngines(lambda text: "ok"), host="192.0.2.1"),
    ):
        pass
    assert set(threading.enumerate()) <= before


def test_an_abort_cancels_rollouts_and_leaves_none_behind() -> None:
    cleaned: list[str] = []

    async def agent(model: Model, prompt: Prompt) -> float:
        try:
            await model.chat([{"role": "user", "content": prompt.text}])
            if prompt.id != "quick":
                await asyncio.sleep(1e6)
        finally:
            cleaned.append(prompt.id)
        return 1.0

    quick, slow = Prompt("quick", (1,), "ab", None), Prompt("slow", (1,), "ab", None)
    engines = TextEngines(lambda text: "ok", embedded=False)
    with rollouts_of(agent, engines) as rollouts:
        first, second = rollouts.submit([quick, slow], sampling(2))
        assert rollouts.wait([first, second]) == {first}
        rollouts.abort([second])
        assert [response.finish_reason for response in rollouts.take(second)] == ["abort", "abort"]
        assert [len(response) for response in rollouts.take(second - 1)] == [3, 3]
        third = rollouts.submit([quick], sampling(2))
        assert rollouts.wait(third) == set(third)
    assert sorted(cleaned) == ["quick"] * 4 + ["slow"] * 2
    assert engines.aborted == 0  # all had their answers


async def posts_and_goes(model: Model, messages: Any) -> None:
    """A client that does not wait for its answer."""
    url, headers = f"{model.base_url}/chat/completions", {"Authorization": f"Bearer {model.api_key}"}
    timeout = aiohttp.ClientTimeout(total=0.5)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as client:
        with pytest.raises(TimeoutError):
            await client.post(url, json={"model": model.name, "messages": messages})


@pytest.mark.parametrize("fate", ["timeout", "returns", "cancelled calls", "clients that go"])
def test_servers_stop_working_for_calls_that_nobody_waits_for(fate: str) -> None:
    left_behind: list[Any] = []

    async def agent(model: Model, prompt: Prompt) -> float:
        await model.chat([{"role": "user", "content": prompt.text}])
        if prompt.id == "left":
            call = posts_and_goes if fate == "clients that go" else Model.chat
            calls = [asyncio.create_task(call(model, [{"role": "user", "content": f"never {k}"}])) for k in range(3)]
            if fate == "timeout":
                await asyncio.gather(*calls)
            while engines.submitted < 5 or (fate == "clients that go" and len(engines.cancelled) < 3):
                await asyncio.sleep(0.01)
            for call in calls if fate == "cancelled calls" else []:
                call.cancel()
            left_behind.extend(calls)
        return 1.0

    engines = SlowServers()
    left, other = Prompt("left", (1,), "ab", None), Prompt("other", (2,), "ok", None)
    seconds = 0.5 if fate == "timeout" else 600.0
    with rollouts_of(agent, engines, timeout_seconds=seconds) as rollouts:
        first, second = rollouts.generate([left, other], sampling())
        assert len(engines.cancelled) == 3 and not engines.asked
    assert first[0].num_sampled_tokens == second[0].num_sampled_tokens == 3
    assert first[0].reward.outcome == ("timeout" if fate == "timeout" else "score")  # type: ignore[attr-defined]
    if fate == "returns":
        assert [str(call.exception()) for call in left_behind] == ["the rollout has ended"] * 3


def test_an_embedded_engine_does_not_begin_requests_of_rollouts_that_have_ended() -> None:
    """A request comes while the engine works on a batch, and its rollout ends before the batch does."""
    works, refused = threading.Event(), threading.Event()

    class SlowEngine(TextEngines):
        def wait(self, ids: Any, seconds: float | None = None) -> set[int]:
            works.set()
            refused.wait(30)
            return super().wait(ids)

    async def agent(model: Model, prompt: Prompt) -> float:
        while prompt.id == "late" and not works.is_set():
            await asyncio.sleep(0.01)
        try:
            await model.chat([{"role": "user", "content": prompt.text}])
        finally:
            if prompt.id == "late":
                refused.set()
        return 1.0

    engines = SlowEngine(lambda text: "ok")
    prompts = [Prompt("early", (1,), "ab", None), Prompt("late", (2,), "ok", None)]
    with rollouts_of(agent, engines, timeout_seconds=1.0) as rollouts:
        _, (late,) = rollouts.generate(prompts, sampling())
    assert late.reward.outcome == "timeout" and engines.submitted == 1  # type: ignore[attr-defined]


def test_over_sampling_and_dynamic_sampling_take_the_fastest_rollouts_and_leave_none_behind() -> None:
    """Prompts 0 and 4 hang, and 2 has no signal."""
    hung: list[str] = []

    async def agent(model: Model, prompt: Prompt) -> float:
        await talk(model, prompt, turns=2)
        if prompt.id in "04":
            try:
                await asyncio.sleep(1e6)
            finally:
                hung.append(prompt.id)
        return float(prompt.id != "2" and next(first[prompt.id]))

    first = {str(i): itertools.cycle([1, 0]) for i in range(100)}
    engines = TextEngines(lambda text: "ok", embedded=False)
    with rollouts_of(agent, engines) as rollouts:
        collector = collector_of({}, rollouts, over_sampling=2.0, prompts_per_step=2)
        collector.grader = Grading(SimpleNamespace(score=list), RewardSettings(name="agent"))  # type: ignore[arg-type]
        collector.sampling = lambda step, draw: sampling(2)
        steps = [collector.collect(step, 0) for step in (1, 2)]
        assert not rollouts._groups and not collector.pending
    trained = [group.prompt.id for step in steps for group in step.groups]
    assert len(trained) == 4 and not {"0", "2", "4"} & set(trained)
    assert set(hung) <= {"0", "4"} and hung.count("0") == 2
    for step in steps:
        assert [response.num_sampled_tokens for _, response, _ in step.responses] == [6] * 4


def test_an_agent_that_blocks_the_event_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCKED_SECONDS", 0.2)
    monkeypatch.setattr(module, "CLEAN_UP_SECONDS", 0.1)
    released = threading.Event()

    async def blocks(model: Model, prompt: Prompt) -> None:
        released.wait()

    rollouts = rollouts_of(blocks, TextEngines(lambda text: "ok"))
    with pytest.raises(UserError, match=r"(?s)asyncio.to_thread.*released.wait"), rollouts:
        try:
            rollouts.generate([PROMPT], sampling())
        finally:
            threading.Thread(target=lambda: (time.sleep(0.5), released.set())).start()


def not_async(model: Model, prompt: Prompt) -> float:
    return 1.0


async def one_argument(model: Model) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [("not_async", "not an async function"), ("one_argument", "too many positional"), ("missing", "has no 'missing'")],
)
def test_what_is_no_agent_is_refused_before_anything_starts(name: str, problem: str) -> None:
    sys.modules.setdefault("agents_of_the_test", sys.modules[__name__])
    with pytest.raises(UserError, match=problem):
        load_agent(AgentSettings(function=f"agents_of_the_test:{name}"))
