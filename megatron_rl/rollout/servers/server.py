"""What SGLang and vLLM have in common: their HTTP connection, and the interface that each implements."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

import aiohttp
import orjson

from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.interface import Address, Drafts
from megatron_rl.types import Response, SamplingParams
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import CollectiveUpdate, FolderUpdate, GroupMember

UNSYNCED = -1
"""Weight version of a server that still has the weights of the folder that it was started from."""
KEY_VARIABLE = "MEGATRON_RL_ENGINE_KEY"
"""Environment variable with the admin key of servers that run already."""
KEEP_ALIVE_SECONDS = 4.0
"""Time for which an unused connection is kept. Servers close theirs after 5 s, which loses a request on its way."""


def parse_json(content: bytes) -> Any:
    """Parses an answer without garbage collections. An answer of SGLang becomes a list per token; the collector would
    look at all of them again and again, for four fifths of the time, and find no garbage. Raises ValueError."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return orjson.loads(content)
    finally:
        if collects:
            gc.enable()


class ServerUnavailable(Exception):
    """The server did not answer, or answered that it is in trouble: retry, or give the server up."""


class ServerRefused(UserError):
    """The server works and refuses the request: a retry would not help."""


class RequestServer(Protocol):
    """What takes requests for responses: a server, or several servers behind a router."""

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float) -> list[Response]:
        """Samples `sampling.n` responses; those that `abort_all` stops have the finish reason abort. Cancelling the
        call ends the server's work on it, at the latest when all requests sent at the same moment are cancelled."""
        ...

    async def abort_all(self) -> None:
        """Makes the server answer every request under way with the tokens sampled so far."""
        ...


class Server(RequestServer, Protocol):
    """A running server. Every method raises ServerUnavailable or ServerRefused."""

    async def alive(self) -> None:
        """Returns once the part that computes, not only the part that speaks HTTP, gave a sign of life."""
        ...

    async def weight_version(self) -> int: ...

    async def drafts(self) -> Drafts:
        """What speculative decoding did since the server's start, or since this connection was made."""
        ...

    async def cannot_freeze(self) -> str:
        """Why requests cannot be kept across a weight update; empty if they can. Called once, before any `freeze`."""
        ...

    async def freeze(self, timeout_seconds: float) -> None:
        """Stops sampling and keeps all requests with their KV cache until `unfreeze`. An update meanwhile leaves that
        cache as it is, and later requests do not use it. Calling it again changes nothing."""
        ...

    async def unfreeze(self, timeout_seconds: float) -> None: ...

    async def load_weights(self, update: FolderUpdate, timeout_seconds: float) -> None:
        """Loads weights from a folder; no request may be under way, unless it is frozen."""
        ...

    async def join_groups(self, members: Sequence[GroupMember], timeout_seconds: float) -> None:
        """Leaves all groups and joins these; returns once all members have joined."""
        ...

    async def receive_weights(self, update: CollectiveUpdate, timeout_seconds: float) -> None:
        """Receives weights that are broadcast at the same time; no request may be under way, unless it is frozen."""
        ...

    async def release_memory(self, timeout_seconds: float) -> None:
        """Frees the GPU memory of weights and cache, and forgets both; no request may be under way."""
        ...

    async def restore_memory(self, part: Literal["weights", "kv_cache"], timeout_seconds: float) -> None:
        """Allocates the memory again: of the weights before an update, of the cache after everything else."""
        ...

    async def verify_weights(self, version: int, sent: Checksums, timeout_seconds: float) -> int:
        """Compares the model's weights with those sent; returns the number of tensors. Raises WeightsDamaged, and
        NotComparable if the server reports other checksums or holds other tensors than the sender expects."""
        ...

    async def close(self) -> None: ...


class HttpClient:
    """Sends JSON and receives JSON or bytes, within one event loop. orjson parses answers: those of SGLang list every
    token."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._opened: aiohttp.ClientSession | None = None

    async def delete(self, path: str, *, timeout_seconds: float) -> Any:
        return await self._send("DELETE", path, None, timeout_seconds)

    async def get(self, path: str, *, timeout_seconds: float) -> Any:
        return await self._send("GET", path, None, timeout_seconds)

    async def post(self, path: str, body: Any = None, *, timeout_seconds: float) -> Any:
        """Returns the answer: parsed if it is JSON, else its text."""
        return await self._send("POST", path, body, timeout_seconds)

    @asynccontextmanager
    async def post_for_stream(
        self, path: str, body: Any, *, timeout_seconds: float
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Gives the body of the answer, to be read as it arrives."""
        async with self._answer("POST", path, body, timeout_seconds) as response:
            yield response.content

    async def _send(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        async with self._answer(method, path, body, timeout_seconds) as response:
            content = await response.read()
        if not content or response.content_type != "application/json":
            return content.decode(errors="replace")
        try:
            return parse_json(content)
        except ValueError as error:
            raise ServerUnavailable(f"{method} {path}: the answer is damaged JSON, {error}") from error

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Any, timeout_seconds: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Gives a successful response, whose body is still to be read."""
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(timeout_seconds, 10.0))
        try:
            async with self._session.request(method, self.address.url + path, json=body, timeout=timeout) as response:
                if response.status >= 400:
                    in_trouble = response.status in (408, 429) or response.status >= 500
                    message = f"{method} {path}: status {response.status}, {(await response.text())[:500]}"
                    raise ServerUnavailable(message) if in_trouble else ServerRefused(message)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerUnavailable(f"{method} {path}: {type(error).__name__} {error}".rstrip()) from error

    @property
    def _session(self) -> aiohttp.ClientSession:
        """The session is opened at the first request, since aiohttp needs a running event loop."""
        if self._opened is None:
            key = self.address.key
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._opened

    async def close(self) -> None:
        if self._opened:
            await self._opened.close()


def versions(spans: Sequence[dict[str, Any]], length: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Converts a server's [{version, start, end}, ...] to a Response's `weight_version` and `version_changes`."""
    starts = [(int(span["start"]), version_of(span["version"])) for span in spans if span["start"] < length]
    if not starts:
        return UNSYNCED, ()
    return starts[0][1], tuple(starts[1:])


def version_of(label: str) -> int:
    """Number of a weight version. A server without updates calls its version "default", unless told otherwise."""
    return UNSYNCED if label == "default" else int(label)
