"""A middleware of vLLM's HTTP server (`--middleware`) that answers a batch of rollout requests with arrays.

vLLM's own handler takes one prompt per request and builds several validated objects per token; with a small model
either takes longer than sampling. `POST /arrays/generate` takes a list of requests from `request_batcher.py`, each
`{"token_ids": ..., "sampling_params": ..., "cache_salt": ...}` without the last one unless it is needed. The answer has
one frame per request (`array_frames.py`), sent as soon as its responses are complete. A frame has no choices if a
request fails: vLLM's own handler then gets the request alone, and reports what is wrong. The middleware changes neither
that handler nor anything else.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from megatron_rl.rollout.engines.vllm.array_frames import Choice, encode
from megatron_rl.rollout.engines.vllm.key_check import App, Message, Receive, Send, has_key

PATH = "/arrays/generate"
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
        headers = [(b"content-type", b"application/octet-stream")]
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
    async def frame(place: int, request: dict[str, Any]) -> None:
        body = encode(place, await _choices(engine, request))
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async with asyncio.TaskGroup() as tasks:
        for place, request in enumerate(requests):
            tasks.create_task(frame(place, request))


async def _choices(engine: Any, request: dict[str, Any]) -> list[Choice] | None:
    outputs: list[Any] = []
    try:
        final, flat = {"output_kind": RequestOutputKind.FINAL_ONLY}, {"flat_logprobs": True}
        sampling = SamplingParams(**request["sampling_params"], **final, **flat)
        prompt = tokens_input(request["token_ids"], cache_salt=request.get("cache_salt"))
        async for answer in engine.generate(prompt, sampling, f"arrays-{uuid.uuid4().hex}"):
            outputs = answer.outputs  # the only answer has all outputs
        return [_choice(output) for output in outputs]
    except Exception:  # vLLM's own handler gets the request next, and reports the error
        return None


def _choice(output: Any) -> Choice:
    token_ids = np.asarray(output.token_ids, dtype=np.int32)
    sampled = np.asarray(output.logprobs.start_indices, dtype=np.int64)  # vLLM puts the sampled token first
    log_probs = np.asarray(output.logprobs.logprobs, dtype=np.float64)[sampled]
    if len(log_probs) != len(token_ids):
        raise ValueError(f"vLLM gave {len(log_probs)} log-probs for {len(token_ids)} tokens")
    log_probs[~(log_probs > LOWEST_LOG_PROB)] = LOWEST_LOG_PROB
    spans = [asdict(span) for span in output.weight_versions or []]
    return Choice(output.index, token_ids, log_probs.astype(np.float32), output.finish_reason, spans)
