"""The model's server: the OpenAI chat format over real connections, with a key for each session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from megatron_rl.agent.conversation import CHARACTERS_PER_TOKEN, Conversation
from megatron_rl.agent.model import Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.agent.server import RETRY_HEADER, SMALLEST_LIMIT, ModelServer
from megatron_rl.config.agent import AgentSettings
from megatron_rl.types import AgentResponse, Prompt
from tests.unit.agent.kit import TOOLS, TextEngines, sampling, tokenizer

PROMPT = Prompt("p", (5, 6), "ab", "ok")
USER = [{"role": "user", "content": "ab"}]
CALL = '<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>'


def nested(levels: int) -> Any:
    value: Any = "a"
    for _ in range(levels):
        value = [value]
    return value


ended: list[AgentResponse] = []
"""The rollouts of `during`, also of those whose check has failed."""


async def post(model: Model, /, key: str | None = None, retried: str = "0", **body: Any) -> tuple[int, Any]:
    """`retried`: how often the `openai` package says that it has made the request before."""
    headers = {"Authorization": f"Bearer {model.api_key if key is None else key}", RETRY_HEADER: retried}
    asked = {"model": model.name, "messages": USER} | body
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"{model.base_url}/chat/completions", json=asked, headers=headers) as answer,
    ):
        text = await answer.text()
        return answer.status, text if body.get("stream") else json.loads(text)


def during(
    check: Callable[[Model], Any], answer: str = "abc", max_turns: int = 32, engines: TextEngines | None = None
) -> AgentResponse:
    """Runs the check as an agent; its errors are raised here. Returns the rollout."""
    errors: list[BaseException] = []

    async def agent(model: Model, prompt: Prompt) -> float:
        try:
            await check(model)
        except BaseException as error:
            errors.append(error)
            raise
        return 1.0

    settings = AgentSettings(function="my:agent", max_turns=max_turns)
    engines = engines or TextEngines(lambda text: answer)
    with AgentRollouts(settings, agent, engines, tokenizer(), 5000) as rollouts:
        ((response,),) = rollouts.generate([PROMPT], sampling())
    assert isinstance(response, AgentResponse)
    ended.append(response)
    if errors:
        raise errors[0]
    return response


def test_a_completion_has_message_usage_and_log_probs() -> None:
    async def check(model: Model) -> None:
        status, whole = await post(model, logprobs=True)
        assert status == 200 and whole["object"] == "chat.completion" and whole["model"] == model.name
        (choice,) = whole["choices"]
        assert choice["message"] == {"role": "assistant", "content": "abc"} and choice["finish_reason"] == "stop"
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["a", "b", "c", "<|im_end|>"]
        assert {entry["logprob"] for entry in choice["logprobs"]["content"]} == {-0.5}
        usage = whole["usage"]
        assert usage["completion_tokens"] == 4 and usage["total_tokens"] == usage["prompt_tokens"] + 4

    assert during(check).num_sampled_tokens == 4


def test_tool_calls_and_their_results_are_one_sequence() -> None:
    async def check(model: Model) -> None:
        _, whole = await post(model, tools=TOOLS)
        (choice,) = whole["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == ""
        assert call["function"] == {"name": "f", "arguments": '{"x": "é"}'}
        result = {"role": "tool", "tool_call_id": call["id"], "content": "5"}
        await post(model, tools=TOOLS, messages=[*USER, choice["message"], result])
        _, plain = await post(model)
        assert plain["choices"][0]["message"]["content"] == CALL  # without tools it is text

    rollout = during(check, CALL)
    assert len(rollout.others) == 1


def test_a_stream_ends_with_usage_and_done() -> None:
    async def check(model: Model) -> None:
        status, text = await post(model, stream=True, stream_options={"include_usage": True}, tools=TOOLS)
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert status == 200 and lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        delta = chunks[0]["choices"][0]["delta"]
        assert delta["role"] == "assistant" and delta["tool_calls"][0]["index"] == 0
        assert chunks[1]["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[2]["usage"]["completion_tokens"] > 0

    during(check, CALL)


def test_limits_of_a_request() -> None:
    async def check(model: Model) -> None:
        _, cut = await post(model, max_completion_tokens=2)
        assert cut["choices"][0]["message"]["content"] == "ab" and cut["choices"][0]["finish_reason"] == "length"
        _, stopped = await post(model, stop="bc")
        assert stopped["choices"][0]["message"]["content"] == "a" and stopped["usage"]["completion_tokens"] == 3

    during(check)


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "gpt-5"),
        ({"model": None}, 404, "model_not_found", "None"),
        ({"model": ["policy"]}, 404, "model_not_found", "policy"),
        *(({"n": n}, 400, "invalid_request_error", "one answer") for n in (2, 0, True, 1.0, "1", [1])),
        *(({"stream": value}, 400, "invalid_request_error", "stream") for value in (1, "yes", {})),
        ({"logprobs": 3}, 400, "invalid_request_error", "logprobs"),
        ({"logprobs": True, "top_logprobs": 5}, 400, "invalid_request_error", "sampled tokens only"),
        ({"tool_choice": "any"}, 400, "invalid_request_error", "none, auto, required"),
        ({"tool_choice": 3}, 400, "invalid_request_error", "tool_choice"),
        *(({"tools": value}, 400, "invalid_request_error", "tools") for value in ("f", {"f": 1}, 3)),
        *(
            ({"tools": [tool]}, 400, "invalid_request_error", "tools.0")
            for tool in ("f", {}, {"type": "function"}, {"type": "function", "function": {"name": 3}})
        ),
        *(({"messages": value}, 400, "invalid_request_error", "messages") for value in (None, "ab", {"role": "user"})),
        ({"messages": [*USER, "ab"]}, 400, "invalid_request_error", "messages.1"),
        ({"messages": [{"role": 3, "content": "ab"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_request_error", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, 400, "invalid_request_error", ""),
        ({"messages": [USER[0] | {"name": {"a": 1}}]}, 400, "invalid_request_error", "name"),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": calls}, *USER]}, 400, "invalid_request_error", "calls")
            for calls in ("f", {"id": "1"}, [3], [{"function": {"name": 3, "arguments": "{}"}}])
        ),
        ({"messages": []}, 400, "invalid_request_error", "at least one message"),
        ({"messages": [{"content": "ab"}]}, 400, "invalid_request_error", "role"),
        ({"max_tokens": -1}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": True}, 400, "invalid_request_error", "max_tokens"),
        ({"max_completion_tokens": 0}, 400, "invalid_request_error", "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": "x"}, 400, "invalid_request_error", "max_tokens"),
        ({"stop": [3]}, 400, "invalid_request_error", "stop"),
        ({"stop": 3}, 400, "invalid_request_error", "stop"),
        ({"stop": {"a": "b"}}, 400, "invalid_request_error", "stop"),
        ({"stop": ["a", ""]}, 400, "invalid_request_error", "stop"),
        ({"stop": "\ud800"}, 400, "invalid_request_error", "surrogate"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, 400, "invalid_request_error", "surrogate"),
        ({"stream_options": "x"}, 400, "invalid_request_error", "stream_options"),
        ({"stream_options": "x", "stream": True}, 400, "invalid_request_error", "stream_options"),
        ({"tools": [nested(700)]}, 400, "invalid_request_error", ""),
        ({"messages": [{"role": "user", "content": nested(700)}]}, 400, "invalid_request_error", "content"),
        ({"key": "wrong"}, 401, "invalid_api_key", "key"),
        ({"key": ""}, 401, "invalid_api_key", "key"),
    ],
)
def test_bad_requests_are_refused_and_nothing_is_recorded(
    body: dict[str, Any], status: int, code: str, words: str
) -> None:
    async def check(model: Model) -> None:
        found, answer = await post(model, **body)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert (found, answer["error"]["code"]) == (status, code) and words in answer["error"]["message"]

    assert during(check).num_sampled_tokens == 0


@pytest.mark.parametrize(
    ("method", "place"),
    [("POST", "responses"), ("POST", "completions"), ("POST", "embeddings"), ("GET", "chat/completions"), ("GET", "")],
)
def test_other_places_are_refused_in_words(method: str, place: str) -> None:
    async def check(model: Model) -> None:
        async with (
            aiohttp.ClientSession() as client,
            client.request(method, f"{model.base_url}/{place}", json={}) as answer,
        ):
            error = (await answer.json())["error"]
            assert answer.status == 404 and "POST chat/completions and GET models only" in error["message"]
            assert error["code"] == "not_found" and place in error["message"]

    during(check)


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({}, b"[" * 100_000, 400),
        ({}, b"\xff", 400),
        ({"Content-Encoding": "gzip"}, b"{}", 400),
        ({"Content-Type": "application/json; charset=none"}, b"{}", 400),
        ({"Authorization": "Bearer \udcff\udcfe"}, b"{}", 401),
    ],
)
def test_bytes_that_are_no_request_are_refused(headers: dict[str, str], data: bytes, status: int) -> None:
    async def check(model: Model) -> None:
        url = urlsplit(model.base_url)
        fields = {"Authorization": f"Bearer {model.api_key}", "Host": "x", "Content-Length": str(len(data))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        start = f"POST {url.path}/chat/completions HTTP/1.1\r\n{head}\r\n".encode(errors="surrogateescape")
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(start + data)
        assert int((await reader.readline()).split()[1]) == status
        writer.close()

    during(check)


def test_a_key_opens_its_own_session_only_and_ends_with_it() -> None:
    seen: list[Model] = []

    async def check(model: Model) -> None:
        seen.append(model)
        for other in seen[:-1]:  # its rollout has ended
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {other.api_key}"}) as client:
                assert (await client.get(f"{model.base_url}/models")).status == 401
                ended = model.base_url.replace(model.session.id, other.session.id)
                assert (await client.get(f"{ended}/models")).status == 401
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {model.api_key}"}) as client:
            models = await (await client.get(f"{model.base_url}/models")).json()
            assert [entry["id"] for entry in models["data"]] == [model.name]

    during(check)
    during(check)


def test_a_limit_of_the_rollout_is_an_error_that_ends_it_as_truncated() -> None:
    async def check(model: Model) -> None:
        assert (await post(model))[0] == 200
        status, answer = await post(model)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        error = RuntimeError("as the openai package raises it")
        error.code = answer["error"]["code"]  # type: ignore[attr-defined]
        raise error

    with pytest.raises(RuntimeError):
        during(check, max_turns=1)
    response = ended[-1]
    assert response.reward is None and response.finish_reason == "length"


@pytest.mark.parametrize("count", [CHARACTERS_PER_TOKEN * 5000, 4 * SMALLEST_LIMIT])
def test_a_conversation_that_cannot_fit_is_refused_without_being_tokenised(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(model: Model) -> None:
        monkeypatch.setattr(Conversation, "_encode", None)
        status, answer = await post(model, messages=[{"role": "user", "content": "a" * count}])
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert model.session.limit_reached

    assert during(check).num_sampled_tokens == 0


def test_many_clients_at_a_time() -> None:
    async def check(model: Model) -> None:
        histories = [[{"role": "user", "content": "a" * k}] for k in range(30)]
        answers = await asyncio.gather(*(post(model, messages=history) for history in histories))
        assert {status for status, _ in answers} == {200}

    assert len(during(check).sequences) == 30


class Lossy:
    """A client whose connection is gone when the server writes the answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses = 0
        written = ModelServer._written

        async def lose(server: ModelServer, request: Any, asked: Any, whole: Any) -> Any:
            if self.losses:
                self.losses -= 1
                request.transport.abort()
            return await written(server, request, asked, whole)

        monkeypatch.setattr(ModelServer, "_written", lose)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_lost_an_answer_gets_it_when_it_asks_again(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    client = Lossy(monkeypatch)

    async def check(model: Model) -> None:
        client.losses = 2
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await post(model, stream=stream)
        assert (await post(model, stream=stream))[0] == 200
        assert model.session.recording.num_sampled_tokens == 4
        await post(model, stream=stream)  # a further sample
        assert (await post(model, stream=stream, max_tokens=2))[0] == 200  # another request

    assert [int(sequence.sampled_mask.sum()) for sequence in during(check).sequences] == [4, 4, 2]


def test_a_client_that_says_so_gets_the_answer_of_its_first_request() -> None:
    async def check(model: Model) -> None:
        for count in ("0", "1", "2"):
            assert (await post(model, retried=count))[0] == 200
        assert model.session.recording.num_sampled_tokens == 4
        assert (await post(model, retried="0"))[0] == 200
        assert (await post(model, retried="1"))[0] == 200  # nobody knows which of the two it was

    assert during(check).num_sampled_tokens == 12


def test_a_call_that_its_client_has_given_up_ends_when_it_asks_again() -> None:
    """Its connection is still there, as behind a proxy that goes on waiting."""
    engines = NeverFirst()

    async def check(model: Model) -> None:
        first = asyncio.create_task(post(model))
        while not engines.submitted:
            await asyncio.sleep(0.01)
        assert (await post(model, retried="1"))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await first

    assert during(check, engines=engines).num_sampled_tokens == 4
    assert engines.cancelled == [0]


class NeverFirst(TextEngines):
    """Servers that never answer their first request."""

    def __init__(self) -> None:
        super().__init__(lambda text: "abc", embedded=False)

    def wait(self, ids: Any, seconds: float | None = None) -> set[int]:
        return super().wait(set(ids) - {0})
