"""The middleware's answers, the requests that it leaves to vLLM's own handler, and requests that are given up. A fake
stands in for vLLM; tests/engines compare the answers with those of the real vLLM."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_rl.rollout.engines.vllm.array_frames import Choice
from tests.unit.rollout.test_vllm_array_frames import decoded

GOOD, BAD, ENDLESS = 5, 6, 7
"""Last tokens of prompts that decide what the fake engine does with them."""
KEY = [(b"authorization", b"Bearer secret")]


@dataclass
class _Span:
    version: str
    start: int
    end: int


class _Prompt(list[int]):
    def __init__(self, token_ids: list[int], cache_salt: str | None = None) -> None:
        super().__init__(token_ids)
        self.cache_salt = cache_salt


class Engine:
    """Answers with two tokens, of which the second is impossible; fails; or never finishes."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.prompts: list[Any] = []

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        self.prompts.append(prompt)
        try:
            if prompt[-1] == ENDLESS:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if prompt[-1] == BAD:
            raise RuntimeError("told to")
        span = _Span("7", 0, 2)
        assert sampling["flat_logprobs"]
        log_probs = SimpleNamespace(start_indices=[0, 2], logprobs=[-0.5, -0.1, float("nan")])
        fields = {"index": 0, "token_ids": (4, 9), "logprobs": log_probs, "finish_reason": "stop"}
        yield SimpleNamespace(outputs=[SimpleNamespace(**fields, weight_versions=[span])])


class Call:
    """One batch of requests to the middleware, sent in two parts; vLLM's own application is behind the middleware."""

    def __init__(
        self, batch_endpoint: Any, *ends: int, headers: Any = KEY, path: str = "/arrays/generate", salt: str = ""
    ) -> None:
        self.passed_on, self.engine = False, Engine()
        self.sent: list[Any] = []
        request = {"sampling_params": {"n": 1}} | ({"cache_salt": salt} if salt else {})
        body = json.dumps([request | {"token_ids": [1, end]} for end in ends]).encode()
        self._messages = [
            {"type": "http.request", "body": body[:10], "more_body": True},
            {"type": "http.request", "body": body[10:]},
        ]
        state = SimpleNamespace(engine_client=self.engine, args=SimpleNamespace(api_key=None))
        scope = {"type": "http", "path": path, "headers": headers, "app": SimpleNamespace(state=state)}
        asyncio.run(batch_endpoint(self.app)(scope, self.receive, self.send))

    @property
    def choices(self) -> dict[int, list[Choice] | None]:
        """Choices of each request, in the order of the answers."""
        return dict(decoded(b"".join(message["body"] for message in self.sent[1:])))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        assert len(self._messages) == 2, "a part of the request was read"
        self.passed_on = True

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop(0)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def batch_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("vllm", "vllm.inputs", "vllm.sampling_params"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].SamplingParams = lambda **fields: fields  # type: ignore[attr-defined]
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    sys.modules["vllm.inputs"].tokens_input = _Prompt  # type: ignore[attr-defined]
    sys.modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "megatron_rl.rollout.engines.vllm.batch_endpoint", raising=False)
    from megatron_rl.rollout.engines.vllm.batch_endpoint import BatchEndpoint

    yield BatchEndpoint
    del sys.modules["megatron_rl.rollout.engines.vllm.batch_endpoint"]


def test_each_request_gets_its_own_answer(batch_endpoint: Any) -> None:
    call = Call(batch_endpoint, GOOD, GOOD)
    assert not call.passed_on and call.sent[0]["status"] == 200 and not call.sent[-1].get("more_body")
    assert call.choices.keys() == {0, 1}
    for choices in call.choices.values():
        (choice,) = choices or []
        assert choice.token_ids.tolist() == [4, 9] and choice.log_probs.tolist() == [-0.5, -9999.0]
        assert (choice.index, choice.finish_reason) == (0, "stop")
        assert choice.weight_versions == [{"version": "7", "start": 0, "end": 2}]


def test_requests_of_different_weights_share_no_prefixes(batch_endpoint: Any) -> None:
    assert [prompt.cache_salt for prompt in Call(batch_endpoint, GOOD, salt="3").engine.prompts] == ["3"]
    assert [prompt.cache_salt for prompt in Call(batch_endpoint, GOOD).engine.prompts] == [None]


def test_a_failing_request_is_left_to_vllms_handler(batch_endpoint: Any) -> None:
    choices = Call(batch_endpoint, GOOD, BAD, GOOD).choices
    assert choices.keys() == {0, 1, 2} and choices[0] and choices[1] is None and choices[2]


def test_answers_do_not_wait_for_the_slowest_request_and_given_up_requests_leave_the_engine(
    batch_endpoint: Any,
) -> None:
    call = Call(batch_endpoint, ENDLESS, GOOD, ENDLESS)
    assert call.choices.keys() == {1} and call.sent[-1]["more_body"], "the answer has ended"
    assert call.engine.cancelled == 2


@pytest.mark.parametrize(
    "changes",
    [{"path": "/inference/v1/generate"}, {"headers": []}, {"headers": [(b"authorization", b"Bearer Secret")]}],
)
def test_all_other_requests_are_passed_on_to_vllm(batch_endpoint: Any, changes: dict[str, Any]) -> None:
    call = Call(batch_endpoint, GOOD, **changes)
    assert call.passed_on and not call.sent
