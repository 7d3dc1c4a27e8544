"""Requests for rollouts that are made at the same moment, sent to a vLLM server as one.

One by one, the engine would begin with the first alone, and the others wait until the server's HTTP process has a turn
beside it: a fifth of the time of a small model's rollouts on two cores. The server's part, and the form of requests and
answers, is `rollout/vllm_brief.py`.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from megatron_rl.rollout.servers.server import HttpClient, ServerRefused, ServerUnavailable

PATH = "/brief/generate"
GATHERING_SECONDS = 0.002
"""How long the first waits for others. A step's requests come one by one from the run's process, within about this."""


@dataclass(frozen=True, slots=True)
class _Asked:
    request: dict[str, Any]
    timeout_seconds: float
    choices: asyncio.Future[list[dict[str, Any]] | None]


class RequestBatcher:
    """For one event loop."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self._gathered: list[_Asked] = []
        self._refused = False
        """Whether the server has not our middleware."""

    async def ask(self, request: dict[str, Any], timeout_seconds: float) -> list[dict[str, Any]] | None:
        """The request's choices, as soon as they are there. None: it is left to vLLM's own handler, as the server does
        not answer briefly, or the request fails. Raises ServerUnavailable."""
        if self._refused:
            return None
        loop = asyncio.get_running_loop()
        asked = _Asked(request, timeout_seconds, loop.create_future())
        if not self._gathered:
            loop.call_later(GATHERING_SECONDS, self._send)
        self._gathered.append(asked)
        return await asked.choices

    def _send(self) -> None:
        batch, self._gathered = [asked for asked in self._gathered if not asked.choices.done()], []
        if not batch:
            return
        answering = asyncio.create_task(self._answer(batch))

        def end(choices: asyncio.Future[Any]) -> None:
            """When the last of those who waited has gone."""
            if choices.cancelled() and all(asked.choices.done() for asked in batch):
                answering.cancel()

        for asked in batch:
            asked.choices.add_done_callback(end)

    async def _answer(self, batch: list[_Asked]) -> None:
        requests = [asked.request for asked in batch]
        seconds = max(asked.timeout_seconds for asked in batch)
        failure: Exception = ServerUnavailable(f"{PATH}: the answer was not whole")
        try:
            async with aclosing(self._http.post_for_lines(PATH, requests, timeout_seconds=seconds)) as lines:
                async for line in lines:
                    choices = batch[line["request"]].choices
                    if not choices.done():
                        choices.set_result(line["choices"])
        except ServerRefused:
            self._refused = True
        except Exception as error:
            failure = error
        for asked in batch:
            if asked.choices.done():
                continue
            if self._refused:
                asked.choices.set_result(None)
            else:
                asked.choices.set_exception(failure)
