"""A middleware of vLLM's HTTP server (`--middleware`) that answers a batch of rollout requests in a compact form.

vLLM's own handler takes one prompt per request and builds several validated objects per token; with a small model
either takes longer than sampling. `POST /brief/generate` takes a list of requests from `request_batcher.py`, each
`{"token_ids": ..., "sampling_params": ...}`. The answer has one line per request, sent as soon as its responses are
complete: `{"request": <index>, "choices": ...}`, with the fields that `server.py` reads and nothing else. Choices are
null if a request fails: vLLM's own handler then gets the request alone, and reports what is wrong. The middleware
changes neither that handler nor anything else.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from megatron_rl.rollout.engines.vllm.key_check import App, Message, Receive, Send, has_key

PATH = "/brief/generate"
LOWEST_LOG_PROB = -9999.0
"""Replaces lower values and NaN, as in vLLM's own answers."""


class BatchEndpoint:
    """ASGI middleware. It runs before vLLM's own check of the key, and may run without `KeyCheck`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or not has_key(scope):
            return await self._app(scope, receive, send)
        requests = json.loads(await _body(receive))
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _unless_gone(_answer(scope["app"].state.engine_client, requests, send), receive)
        except ConnectionAbortedError:
            return None
        await send({"type": "http.response.body", "body": b""})


async def _body(receive: Receive) -> bytes:
    """Body of the request; incomplete if the sender has disconnected."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Returns when the work is done. If the client disconnects, the work is cancelled, which removes its requests from
    the engine, and ConnectionAbortedError is raised."""
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
            outputs = answer.outputs  # the only answer has all outputs
        return [_choice(output) for output in outputs]
    except Exception:  # vLLM's own handler gets the request next, and reports the error
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
