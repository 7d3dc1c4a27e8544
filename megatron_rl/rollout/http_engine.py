"""An engine that is a server: started or attached to, watched, asked over HTTP.

A server is given up (`EngineLost`) when its process ends, when it gives no sign of life, or when it fails to answer
one request again and again. Whoever owns the engine then replaces it whole: nothing of it is used again.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.observability import heartbeat
from megatron_rl.owned_folder import owned_folder
from megatron_rl.rollout import sglang, vllm
from megatron_rl.rollout.engine import EngineLost, UpdateFailed
from megatron_rl.rollout.server import UNSYNCED, Server, ServerLaunch, ServerRefused, ServerUnavailable
from megatron_rl.rollout.server_process import ServerProcess, free_port
from megatron_rl.types import Generation, SamplingParams
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import FolderUpdate, GroupMember, WeightUpdate

T = TypeVar("T")

COMMANDS = {"sglang": sglang.command, "vllm": vllm.command}
SERVERS: dict[str, Callable[[str, str | None], Server]] = {"sglang": sglang.SglangServer, "vllm": vllm.VllmServer}
FOLDER_PREFIX = "megatron-rl-server-"
KEY_VARIABLE = "MEGATRON_RL_ENGINE_KEY"
FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 0.5, 30.0


class HttpEngine:
    """Implements `RolloutEngine`, each method as a coroutine. Paused until the first `resume`."""

    def __init__(self, kind: str, settings: ServerSettings, launch: ServerLaunch, url: str | None = None) -> None:
        """With a `url`, a server that runs already; `launch` is then not read."""
        self.kind, self.settings, self.launch, self.url = kind, settings, launch, url
        self.version: int | None = UNSYNCED
        """None: of more than one."""
        self._process: ServerProcess | None = None
        self._folder: Path | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._under_way = 0
        self._calls = 0
        """Of `generate`, under way."""
        self._cutting = False
        self._released = self._has_room = False
        """Whether its memory was given back, and that of the weights restored since."""
        self._silence_seconds = settings.hang_seconds

    # ------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Start the server, or attach to it, and wait until it answers. Raises EngineLost when it does not."""
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        key = os.environ.get(KEY_VARIABLE) if self.url else secrets.token_hex(16)
        url = self.url
        if url is None:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            self._folder = owned_folder(FOLDER_PREFIX, Path(tempfile.gettempdir()))
            command, environment = COMMANDS[self.kind](self.launch, port, str(key), self._folder)
            self._process = await ServerProcess.start(command, environment)
            self._watches.append(asyncio.create_task(self._lose_at_end(self._process)))
        self._server = SERVERS[self.kind](url, key)
        await self._while_there(self._until_alive())
        self._remove_folder()
        self._watches.append(asyncio.create_task(self._lose_when_silent()))
        _log(f"{self.kind} answers at {url}")

    async def close(self) -> None:
        """End the server if it is ours; returns when its processes are gone."""
        self._lose("it was closed")
        for watch in self._watches:
            watch.cancel()
        if self._process:
            await self._process.stop()
        await self._server.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        """What a server is told in a file it has read when it answers."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def health(self) -> int:
        """The weight version being served."""
        return await self._while_there(self._server.weight_version())

    # ------------------------------------------------------------------ rollouts

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        begun: Sequence[Sequence[Generation]] = (),
        enough: int | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine`. Requests wait while the engine is paused, and go on from where a pause cut them."""
        groups = (
            self._group(prompt, sampling.reseeded(i), begun[i] if begun else ()) for i, prompt in enumerate(prompts)
        )
        self._calls += 1
        try:
            return await self._while_there(_all(groups))
        finally:
            self._calls -= 1

    async def cut(self) -> None:
        """See `RolloutEngine`."""
        self._cutting = True
        try:
            while self._calls:
                await self._while_there(self._abort_until_idle())
                await asyncio.sleep(0.01)
        finally:
            self._cutting = False

    async def pause(self) -> None:
        """Cut what is under way: its tokens so far are kept, the rest is sampled after `resume`, by the new weights if
        there are any."""
        self._open.clear()
        await self._while_there(self._abort_until_idle())

    async def release_memory(self) -> None:
        """See `RolloutEngine`."""
        await self.pause()
        self._released, self.version = True, None
        await self._control(self._server.release_memory(self.settings.update_timeout_seconds))

    async def resume(self) -> None:
        if self.version is None:
            raise UpdateFailed("it has half of an update")
        if self._released:
            await self._control(self._server.restore_memory("kv_cache", self.settings.update_timeout_seconds))
            self._released = self._has_room = False
        self._open.set()

    async def update_weights(self, update: WeightUpdate) -> None:
        """See `RolloutEngine`. It serves no more, and does not resume, until it has the whole of an update."""
        limit, self.version = self.settings.update_timeout_seconds, None
        if self._released and not self._has_room:
            await self._control(self._server.restore_memory("weights", limit))
            self._has_room = True
        if isinstance(update, FolderUpdate):
            await self._control(self._server.load_weights(update, limit))
        else:
            await self._control(self._server.receive_weights(update, limit))
        self.version = update.version

    async def verify_weights(self, version: int, sent: Checksums) -> int:
        return await self._control(self._server.verify_weights(version, sent, self.settings.update_timeout_seconds))

    async def join_groups(self, members: Sequence[GroupMember]) -> None:
        await self._control(self._server.join_groups(members, self.settings.update_timeout_seconds))

    async def _control(self, work: Awaitable[T]) -> T:
        """The work's result. When it fails: UpdateFailed if the server is well otherwise, else EngineLost."""
        limit = self.settings.hang_seconds
        self._silence_seconds = max(limit, self.settings.update_timeout_seconds)  # it may say nothing else meanwhile
        try:
            return await self._while_there(work)
        except (ServerUnavailable, ServerRefused) as error:
            try:
                async with asyncio.timeout(limit):
                    await self._while_there(self._server.alive())
            except (ServerUnavailable, TimeoutError):
                raise self._lose(f"it does not answer after a failed update: {error}") from error
            raise UpdateFailed(str(error)) from error
        finally:
            self._silence_seconds = limit

    async def _group(
        self, prompt: Sequence[int], sampling: SamplingParams, begun: Sequence[Generation]
    ) -> list[Generation]:
        answers = begun or await self._ask(prompt, sampling)
        return await _all(self._finish(prompt, sampling.reseeded(i), a) for i, a in enumerate(answers))

    async def _finish(self, prompt: Sequence[int], sampling: SamplingParams, generation: Generation) -> Generation:
        """Go on with a response until it has an end of its own."""
        while generation.finish_reason == "abort" and not self._cutting:
            done = len(generation.token_ids)
            if done == sampling.max_tokens:
                return generation.followed_by(Generation([], [], "length", generation.weight_version))
            rest = sampling.reseeded(done).remaining(done)
            generation = generation.followed_by((await self._ask([*prompt, *generation.token_ids], rest))[0])
        return generation

    async def _ask(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Generation]:
        """One request, asked again with growing pauses when it fails."""
        attempts = self.settings.request_attempts
        for attempt in range(attempts):
            await self._open.wait()
            if self._cutting:
                return [Generation([], [], "abort", self.version or 0)] * sampling.n
            self._count(+1)
            try:
                answers = await self._server.generate(prompt, sampling, self.settings.request_timeout_seconds)
            except ServerUnavailable as error:
                _log(f"request failed, attempt {attempt + 1} of {attempts}: {error}")
            else:
                self._check(answers, sampling)
                return answers
            finally:
                self._count(-1)
            pause = min(FIRST_BACK_OFF_SECONDS * 2**attempt, LONGEST_BACK_OFF_SECONDS)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        raise self._lose(f"a request failed {attempts} times")

    def _check(self, answers: list[Generation], sampling: SamplingParams) -> None:
        """What no server may get wrong. Weights that are not ours mean that it was restarted behind our back."""
        for answer in answers:
            if len(answer.log_probs) != len(answer.token_ids) or len(answer.token_ids) > sampling.max_tokens:
                raise RuntimeError(
                    f"{self.kind} answered with {len(answer.token_ids)} tokens and {len(answer.log_probs)} log-probs, "
                    f"at most {sampling.max_tokens} were asked for"
                )
            if answer.token_ids and answer.weight_versions[-1] != self.version:
                raise self._lose(f"it serves weights {answer.weight_versions[-1]}, not {self.version}")
        if len(answers) != sampling.n:
            raise RuntimeError(f"{self.kind} gave {len(answers)} responses, {sampling.n} were asked for")

    async def _abort_until_idle(self) -> None:
        """Again and again: a request may be on its way to the server, or between its prefill and its n samples."""
        while self._under_way:
            await self._server.abort_all()
            try:
                await asyncio.wait_for(self._idle.wait(), 0.2)
            except TimeoutError:
                continue

    def _count(self, change: int) -> None:
        self._under_way += change
        if self._under_way:
            self._idle.clear()
        else:
            self._idle.set()

    # ------------------------------------------------------------------ whether it is still there

    async def _until_alive(self) -> None:
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        while True:
            try:
                return await self._server.alive()
            except ServerUnavailable as error:
                if time.monotonic() > deadline:
                    raise self._lose(f"it did not answer within {self.settings.start_timeout_seconds:g} s") from error
                await asyncio.sleep(0.5)

    async def _lose_at_end(self, process: ServerProcess) -> None:
        await process.ended()
        self._lose("its server has ended")

    async def _lose_when_silent(self) -> None:
        heard = time.monotonic()
        while not self._lost.done():
            heartbeat.say(f"{self._under_way} requests under way")
            await asyncio.sleep(min(5.0, self.settings.hang_seconds / 4))
            if self._released:  # a sign of life may be a token, which it has no memory for
                heard = time.monotonic()
                continue
            try:
                async with asyncio.timeout(self.settings.hang_seconds):
                    await self._server.alive()
            except (ServerUnavailable, TimeoutError) as error:
                if time.monotonic() - heard > self._silence_seconds:
                    self._lose(f"it has given no sign of life for {self._silence_seconds:g} s: {error}")
            else:
                heard = time.monotonic()

    def _lose(self, why: str) -> EngineLost:
        """Give the server up: whoever waits for it is told. Returns what to raise."""
        if not self._lost.done():
            _log(f"given up: {why}")
            self._lost.set_result(why)
        return EngineLost(self._lost.result())

    async def _while_there(self, work: Awaitable[T]) -> T:
        """The work's result; EngineLost as soon as the server is given up."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        raise EngineLost(self._lost.result())


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order. When one fails, the others are cancelled and its error is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
