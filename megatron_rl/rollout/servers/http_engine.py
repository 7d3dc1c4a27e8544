"""An engine that is a server: it is started or attached to, watched, and called over HTTP."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial as bound
from pathlib import Path
from typing import TypeVar

from megatron_rl.rollout.engines.interface import Address, Drafts, EngineLaunch, UpdateFailed
from megatron_rl.rollout.engines.kind import SETTING, ServerKind
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.requests import ServerRequests
from megatron_rl.rollout.servers.server import KEY_VARIABLE, UNSYNCED, Server, ServerRefused, ServerUnavailable
from megatron_rl.rollout.servers.server_process import ServerProcess, free_port
from megatron_rl.types import Response, SamplingParams
from megatron_rl.utils.files import owned_folder
from megatron_rl.utils.import_path import import_object
from megatron_rl.weight_sync.checksums import Checksums, NotComparable
from megatron_rl.weight_sync.transport import FolderUpdate, GroupMember, WeightUpdate

T = TypeVar("T")

Command = Callable[[EngineLaunch, int, str, Path], tuple[list[str], dict[str, str]]]
"""(launch, port, key, folder for files that the server reads at its start) -> the command line, and environment
variables to add to those of this process."""
FOLDER_PREFIX = "megatron-rl-server-"
IN_GROUP = 2
"""Factor on the time limit of a broadcast: a healthy engine that is blocked by a hung peer must answer once the
broadcast has failed."""


class HttpEngine:
    """Implements `RolloutEngine` with coroutines. Paused until the first `resume`."""

    def __init__(self, launch: EngineLaunch) -> None:
        assert isinstance(launch.kind, ServerKind)
        self.kind, self.settings, self.launch = launch.kind, launch.server, launch
        self._process: ServerProcess | None = None
        self._folder: Path | None = None
        self._released = self._has_room = False
        """Whether the server's memory was released, and whether the memory of its weights was restored since."""
        self._keeps_requests = self._frozen = False
        """Whether the server keeps requests across updates, and whether it does so at present."""
        self._silence_seconds = self.settings.hang_seconds
        self._drafts = Drafts()
        """What speculative decoding had done by the last `take_drafts`."""
        self._weights_bytes = 0
        """Size of the newest update."""

    # ------------------------------------------------------------------ start and end

    async def start(self) -> Address:
        """Starts the server, or attaches to it, and waits until it answers. Returns its address. Raises EngineLost if
        it does not answer."""
        self._liveness, self._examined = Liveness(), asyncio.Lock()
        if self.launch.url is None:
            port, key = free_port(self.launch.host), secrets.token_hex(16)
            address = Address(f"http://{self.launch.host}:{port}", key)
            self._folder = owned_folder(FOLDER_PREFIX, Path(tempfile.gettempdir()))
            command: Command = import_object(self.kind.command, SETTING)
            self._process = await ServerProcess.start(*command(self.launch, port, key, self._folder))
            self._liveness.lose_at_end_of(self._process)
        else:
            address = Address(self.launch.url, os.environ.get(KEY_VARIABLE))
        self._server: Server = import_object(self.kind.server, SETTING)(address)
        self._requests = ServerRequests(self._server, self.settings, self._liveness, self._liveness.lose)
        await self._liveness.begin(self._server.alive, self.settings.start_timeout_seconds)
        self._remove_folder()
        self._liveness.lose_when_silent(
            self._sign_of_life, self.settings.hang_seconds, lambda: self._silence_seconds, lambda: str(self._requests)
        )
        log(f"{self.kind.name} answers at {address.url}")
        if self.launch.keeps_requests:
            await self._choose_how_to_pause()
        return address

    async def _choose_how_to_pause(self) -> None:
        reason = await self._liveness.while_there(self._server.cannot_freeze())
        self._keeps_requests = not reason
        if reason:
            log(f"weight updates abort requests, which continue after a new prefill: {reason}")
        else:
            log("requests go on across weight updates, with the KV cache that older weights computed")

    async def close(self) -> None:
        """Ends the server if this engine started it; returns once its processes have ended."""
        self._liveness.end()
        if self._process:
            await self._process.stop()
        await self._server.close()
        self._remove_folder()

    async def until_lost(self) -> None:
        """Raises EngineLost once the server is given up, even if there is no call to it."""
        await self._liveness.until_lost()

    async def _sign_of_life(self) -> None:
        """Waits for a sign of life. Gives the server up if another process restarted it, so that it lost its
        weights."""
        async with self._examined:
            if self._released or self._frozen:  # a sign of life may be a token, which there cannot be now
                await self._server.weight_version()
                return
            await self._server.alive()
            given = self._requests.version
            if given not in (None, UNSYNCED):
                held = await self._server.weight_version()
                if held != given == self._requests.version:
                    self._liveness.lose(f"it serves weights {held}, not {given}")

    def _remove_folder(self) -> None:
        """Removes the files for the server's start, which it has read once it answers."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def health(self) -> int:
        """The weight version being served."""
        return await self._liveness.while_there(self._server.weight_version())

    async def take_drafts(self) -> Drafts:
        """See `RolloutEngine`. Servers are asked if they were started to speculate, or by somebody else. A server that
        does not say is no reason to give it up: the log has the reason."""
        if self.launch.url is None and not self.settings.speculates:
            return Drafts()
        try:
            drafts = await self._liveness.while_there(self._server.drafts())
        except (ServerUnavailable, ServerRefused) as error:
            log(f"what speculative decoding did is unknown: {error}")
            return Drafts()
        since, self._drafts = drafts - self._drafts, drafts
        return since

    # ------------------------------------------------------------------ rollouts

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        partial: Sequence[Sequence[Response]] = (),
        min_groups: int | None = None,
    ) -> list[list[Response]]:
        """See `RolloutEngine`. Requests wait while the engine is paused, and continue from where a pause stopped
        them."""
        return await self._requests.generate(prompts, sampling, partial)

    async def abort(self) -> None:
        """See `RolloutEngine`."""
        await self._requests.abort()

    async def pause(self) -> None:
        """Stops sampling until `resume`. The server keeps the requests under way with their KV cache, if it can and
        `EngineLaunch.keeps_requests` asks for it. Else it aborts them; their tokens are kept, and the rest is sampled
        after another prefill, by the newest weights."""
        if not self._keeps_requests:
            return await self._requests.pause()
        self._requests.hold()
        async with self._examined:  # a sign of life under way may still wait for its token
            self._frozen = True
        try:
            await self._control(self._server.freeze, self.settings.hang_seconds)
        except UpdateFailed as error:
            raise self._liveness.lose(f"it does not pause: {error}") from error

    async def release_memory(self) -> None:
        """See `RolloutEngine`."""
        await self.pause()
        async with self._examined:
            self._released, self._requests.version = True, None
        await self._control(self._server.release_memory, self._update_seconds)

    async def resume(self) -> None:
        if self._requests.version is None:
            raise UpdateFailed("it has only a part of a weight update")
        if self._released:
            await self._control(bound(self._server.restore_memory, "kv_cache"), self._update_seconds)
            self._released = self._has_room = False
        if self._frozen:
            await self._control(self._server.unfreeze, self.settings.hang_seconds)
            self._frozen = False
        self._requests.resume()

    async def update_weights(self, update: WeightUpdate) -> None:
        """See `RolloutEngine`. The engine does not resume until it has a complete update."""
        self._requests.version, self._weights_bytes = None, update.nbytes
        await self._make_room()
        if isinstance(update, FolderUpdate):
            await self._control(bound(self._server.load_weights, update), self._update_seconds)
        else:
            await self._control(bound(self._server.receive_weights, update), IN_GROUP * self._update_seconds)
        self._requests.version = update.version

    async def verify_weights(self, version: int, sent: Checksums) -> int:
        """See `RolloutEngine`. Returns 0 and says why in the log if this server's weights cannot be compared."""
        try:
            return await self._control(bound(self._server.verify_weights, version, sent), self._update_seconds)
        except NotComparable as error:
            log(f"not verified: {error}")
            return 0

    async def join_groups(self, members: Sequence[GroupMember]) -> None:
        await self._make_room()  # SGLang allocates memory for weights before its other calls
        limit = max((member.timeout_seconds for member in members), default=self._update_seconds)
        await self._control(bound(self._server.join_groups, members), IN_GROUP * limit)

    async def _make_room(self) -> None:
        """Restores the memory of the weights, if it was released."""
        if self._released and not self._has_room:
            await self._control(bound(self._server.restore_memory, "weights"), self._update_seconds)
            self._has_room = True

    @property
    def _update_seconds(self) -> float:
        return self.settings.update_seconds(self._weights_bytes)

    async def _control(self, work: Callable[[float], Awaitable[T]], seconds: float) -> T:
        """Returns the result of work that may take so long. Raises UpdateFailed if the work fails and the server gives
        a sign of life, else EngineLost."""
        limit = self.settings.hang_seconds
        self._silence_seconds = max(limit, seconds)  # the server may not answer anything else meanwhile
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
