"""Requests that are made at the same moment are sent to a vLLM server as one batch.

Sent one by one, the engine would start with the first request alone, and the others would wait until the server's HTTP
process gets a turn beside the engine: a fifth of the time of a small model's rollouts on two cores. `batch_endpoint.py`
is the server's part, and `array_frames.py` defines the form of answers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from megatron_rl.rollout.engines.vllm.array_frames import Choice, DamagedAnswer, decode
from megatron_rl.rollout.servers.server import HttpClient, ServerRefused, ServerUnavailable

PATH = "/arrays/generate"
GATHERING_SECONDS = 0.002
"""Time for which the first request waits for others. A step's requests arrive from the driver within about this
time."""


@dataclass(frozen=True, slots=True)
class _PendingRequest:
    request: dict[str, Any]
    timeout_seconds: float
    choices: asyncio.Future[list[Choice] | None]


class RequestBatcher:
    """Collects requests within one event loop."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._gathered: list[_PendingRequest] = []
        self._refused = False
        """Whether the server lacks our middleware."""

    async def send(self, request: dict[str, Any], timeout_seconds: float) -> list[Choice] | None:
        """Returns the request's choices as soon as they have arrived. None: the caller must use vLLM's own handler,
        since the server lacks our middleware or the request fails. Raises ServerUnavailable."""
        if self._refused:
            return None
        loop = asyncio.get_running_loop()
        pending = _PendingRequest(request, timeout_seconds, loop.create_future())
        if not self._gathered:
            loop.call_later(GATHERING_SECONDS, self._send_batch)
        self._gathered.append(pending)
        return await pending.choices

    def _send_batch(self) -> None:
        batch, self._gathered = [pending for pending in self._gathered if not pending.choices.done()], []
        if not batch:
            return
        answering = asyncio.create_task(self._answer(batch))

        def end(choices: asyncio.Future[Any]) -> None:
            """Cancels the batch once all of its requests are answered or cancelled."""
            if choices.cancelled() and all(pending.choices.done() for pending in batch):
                answering.cancel()

        for pending in batch:
            pending.choices.add_done_callback(end)

    async def _answer(self, batch: list[_PendingRequest]) -> None:
        requests = [pending.request for pending in batch]
        seconds = max(pending.timeout_seconds for pending in batch)
        failure: Exception = ServerUnavailable(f"{PATH}: the answer was incomplete")
        try:
            async with self._http.post_for_stream(PATH, requests, timeout_seconds=seconds) as stream:
                async for place, found in decode(stream):
                    choices = batch[place].choices
                    if not choices.done():
                        choices.set_result(found)
        except ServerRefused:
            self._refused = True
        except DamagedAnswer as error:
            failure = ServerUnavailable(f"{PATH}: {error}")
        except Exception as error:
            failure = error
        for pending in batch:
            if pending.choices.done():
                continue
            if self._refused:
                pending.choices.set_result(None)
            else:
                pending.choices.set_exception(failure)
