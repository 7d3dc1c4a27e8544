"""NeMo Gym (0.7): an agent for the agent servers of NeMo Gym, over HTTP; nothing of Gym is installed here.

A Gym that runs has one address of its policy (`policy_base_url`), but every rollout here has a URL and key of its own.
A gateway at that one address therefore passes each request on to its rollout, which Gym names in the request: its vLLM
model server copies `metadata.extra_body` of a row into the body of every call of the model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import aiohttp
from aiohttp import web

from megatron_rl.agent.model import Model
from megatron_rl.environments.library import EnvironmentFailed
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, RewardResult

KEY = "rollout_key"
"""Field of a request's body that names the rollout."""
LARGEST_REQUEST = 2**28
Json = dict[str, Any]


class NemoGymAgent:
    """Runs a prompt's row by `POST /run` of an agent server. The row is the prompt's other columns, which must have
    Gym's `responses_create_params`."""

    def __init__(self, url: str) -> None:
        """`url`: that of the agent server, with `?policy=HOST:PORT`, where Gym finds the policy. Raises UserError for a
        URL without it."""
        try:
            parts = urlsplit(url)
            address = urlsplit("//" + parse_qs(parts.query).get("policy", [""])[0])
            host, port = address.hostname, address.port
        except ValueError:  # a port above 65535, or a bracket alone
            host = port = None
        if not host or not port:
            raise UserError(
                f"rollout.agent.function: nemo-gym:{url} must end in ?policy=HOST:PORT, the address of the policy for "
                "Gym, which is started with +policy_base_url=http://HOST:PORT/v1"
            )
        self._run = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/run", "", ""))
        self._gateway = _Gateway(host, port)

    async def __call__(self, model: Model, prompt: Prompt) -> RewardResult | None:
        """Returns the reward; None if Gym fails after the rollout has reached a limit of the run.

        Raises EnvironmentFailed if Gym fails, or says that the reward is no measurement (`mask_sample`).
        """
        row = _with_key(prompt.metadata, model.api_key)
        async with (
            self._gateway.passes_on(model),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as http,
            http.post(self._run, json=row) as response,
        ):
            text = await response.text()
        if response.status != 200:
            if model.session.limit_reached:
                return None
            raise EnvironmentFailed(f"{self._run} answers {response.status}: {text[:500]}")
        answer = json.loads(text)
        if answer.get("mask_sample"):
            raise EnvironmentFailed(f"{answer.get('failure_kind')}: {answer.get('failure_reason')}")
        return RewardResult(float(answer["reward"]))


def _with_key(columns: Json, key: str) -> Json:
    """Returns a row of Gym whose requests carry the rollout's key. Raises EnvironmentFailed for what is no such row."""
    asked = columns.get("responses_create_params")
    if not isinstance(asked, dict):
        raise EnvironmentFailed("the prompt has no column responses_create_params, as the data sets of NeMo Gym have")
    metadata = asked.get("metadata") or {}
    extra = json.loads(metadata.get("extra_body") or "{}") | {KEY: key}
    return columns | {"responses_create_params": asked | {"metadata": metadata | {"extra_body": json.dumps(extra)}}}


class _Gateway:
    """Serves `/v1/chat/completions` at one address while there are rollouts."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._models: dict[str, Model] = {}
        self._listening: asyncio.Task[web.AppRunner] | None = None

    @asynccontextmanager
    async def passes_on(self, model: Model) -> AsyncIterator[None]:
        """Passes on the requests of this rollout. Raises OSError if the address cannot be listened on."""
        self._models[model.api_key] = model
        try:
            if self._listening is None:
                self._listening = asyncio.ensure_future(self._listen())
            await asyncio.shield(self._listening)  # rollouts that start at the same time wait for the one server
            yield
        finally:
            del self._models[model.api_key]
            if not self._models and self._listening is not None:
                listening, self._listening = self._listening, None
                with suppress(OSError):  # it never listened, as every rollout was told
                    await (await listening).cleanup()

    async def _listen(self) -> web.AppRunner:
        app = web.Application(client_max_size=LARGEST_REQUEST)
        app.router.add_post("/v1/chat/completions", self._completions)
        # A request that Gym gives up is cancelled, and so is the engine's work on it.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port, backlog=4096).start()
        except OSError:
            await runner.cleanup()
            raise
        return runner

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model = self._models.get(body.pop(KEY, ""))
        if model is None:
            message = f"the request has no {KEY} of a rollout: metadata.extra_body of the row did not reach the policy"
            return web.json_response({"error": {"message": message, "code": "invalid_api_key"}}, status=401)
        headers = {"Authorization": f"Bearer {model.api_key}"}
        address = f"{model.base_url}/chat/completions"
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as http,
            http.post(address, json=body | {"model": model.name}, headers=headers) as answer,
        ):
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
