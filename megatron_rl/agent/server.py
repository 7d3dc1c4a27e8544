"""The model behind HTTP: `/sessions/<id>/v1/chat/completions` in the OpenAI format, with a key for each session."""

from __future__ import annotations

import asyncio
import json
import resource
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from secrets import compare_digest
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from megatron_rl.agent.conversation import CHARACTERS_PER_TOKEN
from megatron_rl.agent.messages import BadRequest
from megatron_rl.agent.requests import LIMITS, check
from megatron_rl.agent.session import LIMIT_CODE, Answer, LimitReached, Session, SessionClosed

BYTES_PER_TOKEN = 8 * CHARACTERS_PER_TOKEN
"""Bytes of a request for each token of the engine's context: JSON may write a character with 6 bytes."""
RETRY_HEADER = "X-Stainless-Retry-Count"
"""Header of the `openai` package: how often the request was made before."""
SMALLEST_LIMIT = 2**20
"""Bytes that a request may have in any case."""
Json = dict[str, Any]


class _Refused(Exception):
    """A request that gets an error: HTTP status, OpenAI's code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(eq=False)
class _Call:
    task: asyncio.Task[Any]
    answer: Answer | None = None
    lost: bool = False
    """Whether the answer could not be written to the client's connection."""


class ModelServer:
    """Serves the open sessions. All methods run on one event loop."""

    def __init__(self, host: str, model_name: str, sequence_tokens: int) -> None:
        """`sequence_tokens`: the engine's context, by which the size of requests is limited."""
        self._largest_request = max(sequence_tokens * BYTES_PER_TOKEN, SMALLEST_LIMIT)
        self.host, self.model_name = host, model_name
        self._sessions: dict[str, Session] = {}
        self._calls: dict[str, dict[bytes, list[_Call]]] = {}
        """Session -> digest of a request -> the calls that were alike."""
        self._port = 0

    async def start(self) -> None:
        """Listens on a free port. Raises OSError if that is not possible."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each session may hold a connection
        app = web.Application(client_max_size=self._largest_request)
        app.router.add_post("/sessions/{id}/v1/chat/completions", self._completions)
        app.router.add_get("/sessions/{id}/v1/models", self._models)
        app.router.add_route("*", "/{other:.*}", _no_such_place)
        # The request of a client that has gone is cancelled, and so is the engine's work on it.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, 0, backlog=4096)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    def open(self, session: Session) -> str:
        """Serves the session. Returns its base URL."""
        self._sessions[session.id], self._calls[session.id] = session, {}
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self._port}/sessions/{session.id}/v1"

    def close(self, session: Session) -> None:
        del self._sessions[session.id], self._calls[session.id]

    async def _models(self, request: web.Request) -> web.StreamResponse:
        try:
            self._session_of(request)
        except _Refused as error:
            return _error(error)
        return web.json_response({"object": "list", "data": [{"id": self.model_name, "object": "model"}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        try:
            session = self._session_of(request)
            asked = await self._json_of(session, request)
            self._check(asked)
            call = await self._call(session, request)
            answer = call.answer = call.answer or await _answer(session, asked)
        except _Refused as error:
            return _error(error)
        except RecursionError:
            return _error(_Refused(400, "invalid_request_error", "the request is nested too deeply"))
        except BadRequest as error:
            return _error(_Refused(400, "invalid_request_error", str(error)))
        except LimitReached as error:
            return _error(_Refused(400, LIMIT_CODE, str(error)))
        except SessionClosed as error:
            return _error(_Refused(410, "session_closed", str(error)))
        try:
            return await self._written(request, asked, self._completion(session, asked, answer))
        except BaseException:  # the connection is gone, or the handler is cancelled because it is
            call.lost = True
            raise

    async def _written(self, request: web.Request, asked: Json, whole: Json) -> web.StreamResponse:
        """Writes the answer to the client. Raises an error if the connection is gone."""
        if not asked.get("stream"):
            plain = web.json_response(whole)
            await plain.prepare(request)
            await plain.write_eof()
            return plain
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await stream.prepare(request)
        usage = (asked.get("stream_options") or {}).get("include_usage", False)
        for chunk in _chunks(whole, usage=usage):
            await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def _call(self, session: Session, request: web.Request) -> _Call:
        """The call of a request. A client that has lost its connection and asks again gets the answer that it missed,
        which would else be trained beside a second one; a call that it has given up ends.

        The server knows of a lost connection if it could not write the answer, or if the client says that it asks
        again. Any other request with the same body is a further sample, and so is one of several that are alike.
        """
        digest = sha256(await request.read()).digest()
        known = self._calls.get(session.id, {})  # the rollout may have ended meanwhile
        calls = [call for call in known.get(digest, ()) if call.answer or not call.task.done()]
        known[digest] = calls
        again = request.headers.get(RETRY_HEADER, "0") != "0"
        if missed := [call for call in calls if call.lost] or (calls if again and len(calls) == 1 else []):
            if missed[0].answer:
                missed[0].lost = False
                return missed[0]
            missed[0].task.cancel()
            calls.remove(missed[0])
        task = asyncio.current_task()
        assert task
        calls.append(call := _Call(task))
        return call

    def _session_of(self, request: web.Request) -> Session:
        """The session whose key the request has. Whether a session exists is not told without a key."""
        session = self._sessions.get(request.match_info["id"])
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if session is None or not compare_digest(key.encode(errors="replace"), session.key.encode()):
            raise _Refused(401, "invalid_api_key", "there is no open session with this id and key")
        return session

    async def _json_of(self, session: Session, request: web.Request) -> Json:
        try:
            asked = await request.json()
        except (ValueError, LookupError, PayloadEncodingError, web.RequestPayloadError) as error:
            raise BadRequest(f"the request is not JSON: {error}") from error
        except web.HTTPRequestEntityTooLarge as error:
            raise session.limit(f"the request has more than {self._largest_request} bytes") from error
        if not isinstance(asked, dict):
            raise BadRequest("the request is not a JSON object")
        return asked

    def _check(self, asked: Json) -> None:
        if asked.get("model") != self.model_name:
            raise _Refused(
                404, "model_not_found", f"model: {asked.get('model')!r}, but there is {self.model_name!r} only"
            )
        check(asked)

    def _completion(self, session: Session, asked: Json, answer: Answer) -> Json:
        assert answer.message is not None
        count = len(answer.response)
        finish = "tool_calls" if "tool_calls" in answer.message else answer.response.finish_reason
        choice: Json = {"index": 0, "message": answer.message, "finish_reason": finish}
        if asked.get("logprobs") and len(answer.response.log_probs):  # a server that is evaluated gives none
            choice["logprobs"] = {"content": _log_probs(session, answer)}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": count,
                "total_tokens": answer.prompt_tokens + count,
            },
        }


async def _no_such_place(request: web.Request) -> web.StreamResponse:
    place = "/".join(request.path.split("/")[4:]) or request.path
    message = f"{request.method} {place}: there are POST chat/completions and GET models only"
    return _error(_Refused(404, "not_found", message))


async def _answer(session: Session, asked: Json) -> Answer:
    """Temperature, top-p and the like are those of the run, whatever the client asks for: the loss needs the log-probs
    of the policy as it is."""
    stop = () if asked.get("stop") is None else asked["stop"]
    tools = None if asked.get("tool_choice") == "none" else asked.get("tools")
    most = next((asked[name] for name in LIMITS if asked.get(name) is not None), None)
    return await session.chat(asked.get("messages"), tools=tools, max_tokens=most, stop=stop)


def _log_probs(session: Session, answer: Answer) -> list[Json]:
    texts = [session.tokenizer.decode([token]) for token in answer.response.token_ids.tolist()]
    return [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in zip(texts, answer.response.log_probs.tolist(), strict=True)
    ]


def _chunks(whole: Json, *, usage: bool) -> Iterator[Json]:
    """The chunks of a stream. The engine gives an answer as a whole, so that there is one chunk with all of it."""
    head = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    choice = whole["choices"][0]
    message = choice["message"]
    if calls := message.get("tool_calls"):
        message = message | {"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]}
    content = {"index": 0, "delta": message, "finish_reason": None}
    if "logprobs" in choice:
        content["logprobs"] = choice["logprobs"]
    yield head | {"choices": [content]}
    yield head | {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    if usage:
        yield head | {"choices": [], "usage": whole["usage"]}


def _error(error: _Refused) -> web.Response:
    kind = "authentication_error" if error.status == 401 else "invalid_request_error"
    body = {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
    return web.json_response(body, status=error.status)
