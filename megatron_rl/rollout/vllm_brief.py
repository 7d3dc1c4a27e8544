"""Brief answers to rollout requests: a middleware of vLLM's HTTP server, named to it on its command line.

vLLM's own handler builds several checked objects a token; with a small model that takes longer than HTTP itself. A
request that says `"brief": true` is answered with what `rollout/vllm.py` reads, and nothing else. Any other request,
one without the key, and one that fails goes on to vLLM's handler, which answers it or says in its own words what is
wrong. It knows no "brief" and answers such a request at length: a server without this middleware is slower, no more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from vllm import SamplingParams, envs
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATH = "/inference/v1/generate"
FIELDS = {"brief", "token_ids", "sampling_params"}
LOWEST_LOG_PROB = -9999.0
"""In the place of less, and of NaN, as in vLLM's own answers."""


class BriefAnswers:
    """ASGI middleware. It stands before the one that asks for the key, so it looks at that itself."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or not _has_key(scope):
            return await self._app(scope, receive, send)
        first = await _whole(receive)
        answer = None
        if (request := _brief(first)) is not None:
            try:
                answer = await _unless_gone(_generate(scope["app"].state.engine_client, request), receive)
            except ConnectionAbortedError:
                return None
            except Exception:  # vLLM's handler meets it again, and says what it is
                answer = None
        if answer is None:
            return await self._app(scope, _again(first, receive), send)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def _has_key(scope: Message) -> bool:
    """Or needs none."""
    keys = [key for key in scope["app"].state.args.api_key or [envs.VLLM_API_KEY] if key]
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not keys or any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in keys)


async def _whole(receive: Receive) -> Message:
    """The request's body as one message; or that its sender has gone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return message | {"body": body} if message["type"] == "http.request" else message


def _again(first: Message, receive: Receive) -> Receive:
    """`receive` for one who has not read the request yet."""
    left = [first]

    async def receive_again() -> Message:
        return left.pop() if left else await receive()

    return receive_again


def _brief(message: Message) -> dict[str, Any] | None:
    """The request, if it is one for us."""
    try:
        request = json.loads(message.get("body", b""))
    except ValueError:
        return None
    return request if isinstance(request, dict) and request.keys() == FIELDS and request["brief"] is True else None


async def _unless_gone(work: Awaitable[bytes], receive: Receive) -> bytes:
    """The work's result. When who asked goes away it is cancelled, which takes it from the engine, and
    ConnectionAbortedError is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionAbortedError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _generate(engine: Any, request: dict[str, Any]) -> bytes:
    sampling = SamplingParams(**request["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY)
    outputs: list[Any] = []
    async for answer in engine.generate(tokens_input(request["token_ids"]), sampling, f"brief-{uuid.uuid4().hex}"):
        outputs = answer.outputs  # one answer, with all
    return json.dumps({"choices": [_choice(output) for output in outputs]}).encode()


def _choice(output: Any) -> dict[str, Any]:
    log_probs = (entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
    return {
        "index": output.index,
        "token_ids": list(output.token_ids),
        "logprobs": {"content": [{"logprob": p if p > LOWEST_LOG_PROB else LOWEST_LOG_PROB} for p in log_probs]},
        "finish_reason": output.finish_reason,
        "weight_versions": [asdict(span) for span in output.weight_versions or []],
    }
