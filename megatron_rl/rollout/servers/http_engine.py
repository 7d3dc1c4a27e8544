"""An engine that is a server: started or attached to, watched, asked over HTTP."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import UpdateFailed
from megatron_rl.rollout.engines.sglang import server as sglang
from megatron_rl.rollout.engines.vllm import server as vllm
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.requests import Requests
from megatron_rl.rollout.servers.server import (
    KEY_VARIABLE,
    UNSYNCED,
    Address,
    Server,
    ServerLaunch,
    ServerRefused,
    ServerUnavailable,
)
from megatron_rl.rollout.servers.server_process import ServerProcess, free_port
from megatron_rl.types import Generation, SamplingParams
from megatron_rl.utils.files import owned_folder
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import FolderUpdate, GroupMember, WeightUpdate

T = TypeVar("T")

COMMANDS = {"sglang": sglang.command, "vllm": vllm.command}
SERVERS: dict[str, Callable[[Address], Server]] = {"sglang": sglang.SglangServer, "vllm": vllm.VllmServer}
FOLDER_PREFIX = "megatron-rl-server-"
IN_GROUP = 2
"""Times as long as an update may take: one who is well, but waits in a broadcast for one who hangs, is to be heard of
when the broadcast has failed."""


class HttpEngine:
    """Implements `RolloutEngine`, each method as a coroutine. Paused until the first `resume`."""

    def __init__(self, kind: str, settings: ServerSettings, launch: ServerLaunch, url: str | None = None) -> None:
        """With a `url`, a server that runs already; `launch` is then not read."""
        self.kind, self.settings, self.launch, self.url = kind, settings, launch, url
        self._process: ServerProcess | None = None
        self._folder: Path | None = None
        self._released = self._has_room = False
        """Whether its memory was given back, and that of the weights restored since."""
        self._silence_seconds = settings.hang_seconds
        self._weights_bytes = 0
        """Of the newest update."""

    # ------------------------------------------------------------------ its life

    async def start(self) -> Address:
        """Start the server, or attach to it, and wait until it answers. Returns where it is. Raises EngineLost when it
        does not."""
        self._liveness, self._examined = Liveness(), asyncio.Lock()
        if self.url is None:
            port, key = free_port(self.launch.host), secrets.token_hex(16)
            address = Address(f"http://{self.launch.host}:{port}", key)
            self._folder = owned_folder(FOLDER_PREFIX, Path(tempfile.gettempdir()))
            command, environment = COMMANDS[self.kind](self.launch, port, key, self._folder)
            self._process = await ServerProcess.start(command, environment)
            self._liveness.lose_at_end_of(self._process)
        else:
            address = Address(self.url, os.environ.get(KEY_VARIABLE))
        self._server = SERVERS[self.kind](address)
        self._requests = Requests(self._server, self.settings, self._liveness, self._liveness.lose)
        await self._liveness.begin(self._server.alive, self.settings.start_timeout_seconds)
        self._remove_folder()
        self._liveness.lose_when_silent(
            self._sign_of_life, self.settings.hang_seconds, lambda: self._silence_seconds, lambda: str(self._requests)
        )
        log(f"{self.kind} answers at {address.url}")
        return address

    async def close(self) -> None:
        """End the server if it is ours; returns when its processes are gone."""
        self._liveness.end()
        if self._process:
            await self._process.stop()
        await self._server.close()
        self._remove_folder()

    async def until_lost(self) -> None:
        """Raises EngineLost when it is given up, though nobody asks it for anything."""
        await self._liveness.until_lost()

    async def _sign_of_life(self) -> None:
        """Besides, a server that was restarted behind our back has not the weights that it was given."""
        async with self._examined:
            if self._released:  # a sign of life may be a token, for which there is no memory
                await self._server.weight_version()
                return
            await self._server.alive()
            given = self._requests.version
            if given not in (None, UNSYNCED):
                held = await self._server.weight_version()
                if held != given == self._requests.version:
                    self._liveness.lose(f"it serves weights {held}, not {given}")

    def _remove_folder(self) -> None:
        """What a server is told in a file it has read when it answers."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def health(self) -> int:
        """The weight version being served."""
        return await self._liveness.while_there(self._server.weight_version())

    # ------------------------------------------------------------------ rollouts

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        begun: Sequence[Sequence[Generation]] = (),
        enough: int | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine`. Requests wait while the engine is paused, and go on from where a pause cut them."""
        return await self._requests.generate(prompts, sampling, begun)

    async def cut(self) -> None:
        """See `RolloutEngine`."""
        await self._requests.cut()

    async def pause(self) -> None:
        """Cut what is under way: its tokens so far are kept, the rest is sampled after `resume`, by the new weights if
        there are any."""
        await self._requests.pause()

    async def release_memory(self) -> None:
        """See `RolloutEngine`."""
        await self.pause()
        async with self._examined:
            self._released, self._requests.version = True, None
        await self._control(self._server.release_memory, self._update_seconds)

    async def resume(self) -> None:
        if self._requests.version is None:
            raise UpdateFailed("it has half of an update")
        if self._released:
            await self._control(partial(self._server.restore_memory, "kv_cache"), self._update_seconds)
            self._released = self._has_room = False
        self._requests.resume()

    async def update_weights(self, update: WeightUpdate) -> None:
        """See `RolloutEngine`. It serves no more, and does not resume, until it has the whole of an update."""
        self._requests.version, self._weights_bytes = None, update.nbytes
        await self._make_room()
        if isinstance(update, FolderUpdate):
            await self._control(partial(self._server.load_weights, update), self._update_seconds)
        else:
            await self._control(partial(self._server.receive_weights, update), IN_GROUP * self._update_seconds)
        self._requests.version = update.version

    async def verify_weights(self, version: int, sent: Checksums) -> int:
        return await self._control(partial(self._server.verify_weights, version, sent), self._update_seconds)

    async def join_groups(self, members: Sequence[GroupMember]) -> None:
        await self._make_room()  # SGLang gets ready for weights before it hears of anything else
        limit = max((member.timeout_seconds for member in members), default=self._update_seconds)
        await self._control(partial(self._server.join_groups, members), IN_GROUP * limit)

    async def _make_room(self) -> None:
        """Have the memory of the weights again."""
        if self._released and not self._has_room:
            await self._control(partial(self._server.restore_memory, "weights"), self._update_seconds)
            self._has_room = True

    @property
    def _update_seconds(self) -> float:
        return self.settings.update_seconds(self._weights_bytes)

    async def _control(self, work: Callable[[float], Awaitable[T]], seconds: float) -> T:
        """The work's result, which may take so long. When it fails: UpdateFailed if the server is well otherwise, else
        EngineLost."""
        limit = self.settings.hang_seconds
        self._silence_seconds = max(limit, seconds)  # it may say nothing else meanwhile
        try:
            return await self._liveness.while_there(work(seconds))
        except (ServerUnavailable, ServerRefused) as error:
            try:
                async with asyncio.timeout(limit):
                    await self._liveness.while_there(self._sign_of_life())
            except (ServerUnavailable, ServerRefused, TimeoutError):
                raise self._liveness.lose(f"it does not answer after a failed update: {error}") from error
            raise UpdateFailed(str(error)) from error
        finally:
            self._silence_seconds = limit
