"""Rollout requests answered together and briefly: a middleware of vLLM's HTTP server, named to it on its command line.

vLLM's own handler takes one prompt a request and builds several checked objects a token, either of which takes longer
than sampling with a small model. `POST /brief/generate` takes a list of requests from `rollout/vllm_together.py`, each
`{"token_ids": ..., "sampling_params": ...}`. The answer has a line for each, as soon as its responses are there:
`{"request": <place>, "choices": ...}`, with what `rollout/vllm.py` reads and nothing else. Choices are null where a
request fails: vLLM's own handler, asked for it alone, says in its own words what is wrong. That handler, and all else,
is as it is without this middleware.
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

PATH = "/brief/generate"
LOWEST_LOG_PROB = -9999.0
"""In the place of less, and of NaN, as in vLLM's own answers."""


class BatchEndpoint:
    """ASGI middleware. It stands before the one that asks for the key, so it looks at that itself."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or not _has_key(scope):
            return await self._app(scope, receive, send)
        requests = json.loads(await _body(receive))
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _unless_gone(_answer(scope["app"].state.engine_client, requests, send), receive)
        except ConnectionAbortedError:
            return None
        await send({"type": "http.response.body", "body": b""})


def _has_key(scope: Message) -> bool:
    """Or needs none."""
    keys = [key for key in scope["app"].state.args.api_key or [envs.VLLM_API_KEY] if key]
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not keys or any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in keys)


async def _body(receive: Receive) -> bytes:
    """Of the request; not all of it, if its sender has gone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Returns when it is done. When who asked goes away it is cancelled, which takes it from the engine, and
    ConnectionAbortedError is raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionAbortedError
        task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _answer(engine: Any, requests: list[dict[str, Any]], send: Send) -> None:
    async def line(place: int, request: dict[str, Any]) -> None:
        answer = json.dumps({"request": place, "choices": await _choices(engine, request)})
        await send({"type": "http.response.body", "body": answer.encode() + b"\n", "more_body": True})

    async with asyncio.TaskGroup() as tasks:
        for place, request in enumerate(requests):
            tasks.create_task(line(place, request))


async def _choices(engine: Any, request: dict[str, Any]) -> list[dict[str, Any]] | None:
    outputs: list[Any] = []
    try:
        sampling = SamplingParams(**request["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY)
        async for answer in engine.generate(tokens_input(request["token_ids"]), sampling, f"brief-{uuid.uuid4().hex}"):
            outputs = answer.outputs  # one answer, with all
        return [_choice(output) for output in outputs]
    except Exception:  # vLLM's handler meets it again, and says what it is
        return None


def _choice(output: Any) -> dict[str, Any]:
    log_probs = (entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
    return {
        "index": output.index,
        "token_ids": list(output.token_ids),
        "logprobs": {"content": [{"logprob": p if p > LOWEST_LOG_PROB else LOWEST_LOG_PROB} for p in log_probs]},
        "finish_reason": output.finish_reason,
        "weight_versions": [asdict(span) for span in output.weight_versions or []],
    }
