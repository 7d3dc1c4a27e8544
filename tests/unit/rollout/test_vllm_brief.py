"""Which requests the middleware takes from vLLM's own handler, and what becomes of those that are given up. vLLM itself
is stood in for; that the answers are the same is tested with the real one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

REQUEST = {"brief": True, "token_ids": [1, 5], "sampling_params": {"n": 1}}
KEY = [(b"authorization", b"Bearer secret")]


@dataclass
class _Span:
    version: str
    start: int
    end: int


class Engine:
    """Answers with two tokens, the second impossible; fails; or is never done."""

    def __init__(self, does: str = "answer") -> None:
        self.does, self.cancelled = does, False

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            if self.does == "wait":
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.does == "fail":
            raise RuntimeError("told to")
        span = _Span("7", 0, 2)
        log_probs = [{4: SimpleNamespace(logprob=-0.5)}, {9: SimpleNamespace(logprob=float("nan"))}]
        fields = {"index": 0, "token_ids": (4, 9), "logprobs": log_probs, "finish_reason": "stop"}
        yield SimpleNamespace(outputs=[SimpleNamespace(**fields, weight_versions=[span])])


class Call:
    """One request through the middleware; vLLM's handler behind it notes the body that it reads."""

    def __init__(self, brief_answers: Any, engine: Engine, body: bytes, headers: Any, stays: bool = True) -> None:
        self.passed_on: list[bytes] = []
        self.sent: list[Any] = []
        half = len(body) // 2
        self._messages = [
            {"type": "http.request", "body": body[:half], "more_body": True},
            {"type": "http.request", "body": body[half:]},
        ]
        self._stays = stays
        state = SimpleNamespace(engine_client=engine, args=SimpleNamespace(api_key=None))
        scope = {"type": "http", "path": "/inference/v1/generate", "headers": headers}
        asyncio.run(brief_answers(self.app)(scope | {"app": SimpleNamespace(state=state)}, self.receive, self.send))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        message = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        self.passed_on.append(body)

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop(0)
        await asyncio.sleep(60 if self._stays else 0.01)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def brief_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("vllm", "vllm.inputs", "vllm.sampling_params"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].SamplingParams = lambda **fields: fields  # type: ignore[attr-defined]
    sys.modules["vllm"].envs = SimpleNamespace(VLLM_API_KEY="secret")  # type: ignore[attr-defined]
    sys.modules["vllm.inputs"].tokens_input = list  # type: ignore[attr-defined]
    sys.modules["vllm.sampling_params"].RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "megatron_rl.rollout.vllm_brief", raising=False)
    from megatron_rl.rollout.vllm_brief import BriefAnswers

    yield BriefAnswers
    del sys.modules["megatron_rl.rollout.vllm_brief"]


def test_a_brief_request_is_answered(brief_answers: Any) -> None:
    call = Call(brief_answers, Engine(), json.dumps(REQUEST).encode(), KEY)
    assert not call.passed_on and call.sent[0]["status"] == 200
    (choice,) = json.loads(call.sent[1]["body"])["choices"]
    assert choice == {
        "index": 0,
        "token_ids": [4, 9],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -9999.0}]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "7", "start": 0, "end": 2}],
    }


@pytest.mark.parametrize(
    ("body", "headers", "does"),
    [
        (REQUEST | {"brief": False}, KEY, "answer"),
        (REQUEST | {"stream": True}, KEY, "answer"),
        ({"token_ids": [1, 5], "sampling_params": {}}, KEY, "answer"),
        ([REQUEST], KEY, "answer"),
        (REQUEST, [], "answer"),
        (REQUEST, [(b"authorization", b"Bearer Secret")], "answer"),
        (REQUEST, KEY, "fail"),
    ],
)
def test_the_rest_reaches_vllms_handler_whole(brief_answers: Any, body: Any, headers: Any, does: str) -> None:
    call = Call(brief_answers, Engine(does), json.dumps(body).encode(), headers)
    assert [json.loads(passed) for passed in call.passed_on] == [body] and not call.sent


def test_what_is_no_json_too(brief_answers: Any) -> None:
    assert Call(brief_answers, Engine(), b"{", KEY).passed_on == [b"{"]


def test_a_request_that_is_given_up_leaves_the_engine(brief_answers: Any) -> None:
    engine = Engine("wait")
    call = Call(brief_answers, engine, json.dumps(REQUEST).encode(), KEY, stays=False)
    assert engine.cancelled and not call.passed_on and not call.sent
