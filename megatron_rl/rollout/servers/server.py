"""What SGLang and vLLM have in common: how they are reached, and what each must be able to do."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import aiohttp

from megatron_rl.errors import UserError
from megatron_rl.types import Generation, SamplingParams
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import CollectiveUpdate, FolderUpdate, GroupMember

UNSYNCED = -1
"""Weight version of a server that still has the weights of the folder it was started from."""


LOOPBACK = "127.0.0.1"
KEY_VARIABLE = "MEGATRON_RL_ENGINE_KEY"
"""Environment variable that has the admin key of servers which run already."""


KEEP_ALIVE_SECONDS = 4.0
"""An unused connection is kept for so long. Servers close theirs after 5 s, and a request on its way then is lost."""


class ServerUnavailable(Exception):
    """No answer, or one that says the server is in trouble: ask again, or give it up."""


class ServerRefused(UserError):
    """The server is well and will not do this: asking again would not help."""


@dataclass(frozen=True, slots=True)
class ServerLaunch:
    """What a server is started with."""

    model_folder: Path
    device: str
    """cpu or cuda."""
    dtype: str
    tensor_parallel: int
    max_tokens: int
    """Longest prompt and response together."""
    arguments: tuple[str, ...] = ()
    """Last on the command line, so that they win."""
    colocated: bool = False
    """It is to give its GPU memory back while the actor trains."""
    environment: dict[str, str] = field(default_factory=dict)
    python: Path | None = None
    """Interpreter; None: this one."""
    host: str = LOOPBACK
    """Where it listens."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the key that it wants; None where it wants none."""

    url: str
    key: str | None = None


class Server(Protocol):
    """One running server. Every method raises ServerUnavailable or ServerRefused."""

    async def alive(self) -> None:
        """Return when the part that computes, not only the one that speaks HTTP, gave a sign of life."""
        ...

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float
    ) -> list[Generation]:
        """`sampling.n` responses; those that `abort_all` cut short have the finish reason abort. Cancelling the call
        ends the work on it too, at the latest when nobody waits for those that were asked at the same moment."""
        ...

    async def abort_all(self) -> None:
        """Every request under way is answered with what there is of it."""
        ...

    async def weight_version(self) -> int: ...

    async def load_weights(self, update: FolderUpdate, timeout_seconds: float) -> None:
        """Take weights from a folder; nothing may be generating."""
        ...

    async def join_groups(self, members: Sequence[GroupMember], timeout_seconds: float) -> None:
        """Leave the groups of before and join these; returns when all members have."""
        ...

    async def receive_weights(self, update: CollectiveUpdate, timeout_seconds: float) -> None:
        """Take weights that are broadcast meanwhile; nothing may be generating."""
        ...

    async def release_memory(self, timeout_seconds: float) -> None:
        """Give the GPU memory of weights and cache back, and forget both; nothing may be generating."""
        ...

    async def restore_memory(self, part: Literal["weights", "kv_cache"], timeout_seconds: float) -> None:
        """Have it again: of the weights before they are updated, of the cache when all else is done."""
        ...

    async def verify_weights(self, version: int, sent: Checksums, timeout_seconds: float) -> int:
        """Compare what the model has with what was sent; returns how many tensors. Raises WeightsDamaged."""
        ...

    async def close(self) -> None: ...


class HttpClient:
    """JSON in, JSON out. For one event loop."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._opened: aiohttp.ClientSession | None = None

    async def delete(self, path: str, *, timeout_seconds: float) -> Any:
        return await self._send("DELETE", path, None, timeout_seconds)

    async def get(self, path: str, *, timeout_seconds: float) -> Any:
        return await self._send("GET", path, None, timeout_seconds)

    async def post(self, path: str, body: Any = None, *, timeout_seconds: float) -> Any:
        """The answer: parsed if it is JSON, else its text."""
        return await self._send("POST", path, body, timeout_seconds)

    async def post_for_lines(self, path: str, body: Any, *, timeout_seconds: float) -> AsyncGenerator[Any, None]:
        """Each line of the answer, parsed, as soon as it is there."""
        async with self._answer("POST", path, body, timeout_seconds) as response:
            begun: list[bytes] = []
            async for chunk in response.content.iter_any():
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    yield json.loads(b"".join([*begun, end]))
                    begun = []
                begun.append(rest)

    async def _send(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        async with self._answer(method, path, body, timeout_seconds) as response:
            text = await response.text()
        return json.loads(text) if text and response.content_type == "application/json" else text

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Any, timeout_seconds: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A good one, of which the rest is to be read."""
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(timeout_seconds, 10.0))
        try:
            async with self._session.request(method, self.address.url + path, json=body, timeout=timeout) as response:
                if response.status >= 400:
                    troubled = response.status in (408, 429) or response.status >= 500
                    words = f"{method} {path}: status {response.status}, {(await response.text())[:500]}"
                    raise ServerUnavailable(words) if troubled else ServerRefused(words)
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerUnavailable(f"{method} {path}: {type(error).__name__} {error}".rstrip()) from error

    @property
    def _session(self) -> aiohttp.ClientSession:
        """aiohttp's needs the loop to be running already."""
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
    """A server's [{version, start, end}, ...] as `weight_version` and `version_changes` of a `Generation`."""
    starts = [(int(span["start"]), version_of(span["version"])) for span in spans if span["start"] < length]
    if not starts:
        return UNSYNCED, ()
    return starts[0][1], tuple(starts[1:])


def version_of(label: str) -> int:
    """A server that was given no weights yet calls its own "default", if it was not told otherwise."""
    return UNSYNCED if label == "default" else int(label)
