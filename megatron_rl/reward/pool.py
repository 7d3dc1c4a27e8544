"""Verifiers in worker processes, which can be killed. The workers also decode the responses."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pebble import ProcessExpired, ProcessPool

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward.decode import text_of
from megatron_rl.reward.resolve import load_reward
from megatron_rl.reward.results import plain_text, result_of
from megatron_rl.types import Decode, Reward, RewardResult, Sample
from megatron_rl.utils.files import owned_folder, redirect_output, remove_tree

CHUNKS_PER_WORKER = 4
"""More chunks even out the load; fewer chunks cost fewer round trips."""
CHUNK_SECONDS = 1.0
"""A worker returns a chunk unfinished after this time, so that slow samples cannot add up to a timeout."""
ATTEMPTS = 3
"""How often one call of `score` may find the whole pool broken."""

PACKAGE = str(Path(__file__).parents[1])
OUT_OF_MEMORY, WORN_OUT = 86, 87
"""Exit codes of a worker: the sample needed too much memory; earlier samples leaked too much memory."""


class RewardPool:
    """Scores samples with `settings.name` in `settings.workers` processes, with a limit of `settings.timeout_seconds`
    per sample.

    A verifier that hangs, crashes, leaks or raises costs only its own sample: the outcome is "timeout" or "error", and
    its process is replaced. Workers ignore Ctrl-C, redirect the verifier's output to `log_file` (default: stderr), and
    import only what the verifier needs. The pool is a context manager: no worker outlives the pool or the process that
    made the pool.
    """

    def __init__(self, settings: RewardSettings, log_file: Path | None = None, decode: Decode | None = None) -> None:
        """`decode` turns responses into text in the workers; None: every sample already has its text.

        Raises UserError at once for a reward that cannot be loaded.
        """
        load_reward(settings)
        self._settings = settings
        self._decode = decode
        self._log_file = log_file
        self._pool = self._start()

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result per sample, in order. Raises RuntimeError if the workers cannot be kept alive."""
        for _ in range(ATTEMPTS):
            try:
                return self._score(samples)
            except BrokenProcessPool:
                # A worker died between two samples, for an outside reason: no sample caused it.
                self.close()
                self._pool = self._start()
        raise RuntimeError(f"the reward workers died {ATTEMPTS} times in a row; is the machine out of memory?")

    def _score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        results: dict[int, RewardResult] = {}
        size = max(1, math.ceil(len(samples) / (self._settings.workers * CHUNKS_PER_WORKER)))
        everything = list(range(len(samples)))
        waiting = [everything[first : first + size] for first in range(0, len(samples), size)]
        running: dict[Future[list[RewardResult]], list[int]] = {}
        while waiting or running:
            if not self._pool.active:
                raise BrokenProcessPool
            for indices in waiting:
                # A chunk ends by itself after CHUNK_SECONDS and the time of its current sample.
                timeout = self._settings.timeout_seconds + (CHUNK_SECONDS if len(indices) > 1 else 0.0)
                running[self._pool.schedule(_score_chunk, [[samples[i] for i in indices]], timeout=timeout)] = indices
            waiting = []
            # The wait is bounded, because a pool that breaks may leave futures behind.
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                waiting += _collect(future, running.pop(future), results)
        return [self._with_text(results[i], samples[i]) for i in range(len(samples))]

    def _with_text(self, result: RewardResult, sample: Sample) -> RewardResult:
        """Returns the result with the response's text, which a worker that died could not return."""
        if result.text:
            return result
        try:
            return replace(result, text=text_of(sample, self._decode))
        except ValueError as error:
            return _failure(error) if result.has_score else result

    def close(self) -> None:
        """Ends the workers, whether busy or not. Calling it again is harmless."""
        self._pool.stop()
        self._pool.join()
        with suppress(OSError):  # the next pool on this machine removes what a dying program still holds
            remove_tree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        # Temporary files of workers that are killed stay behind there, and go with the folder.
        self._folder = owned_folder("megatron-rl-reward-", Path(tempfile.gettempdir()))
        pool = ProcessPool(
            max_workers=self._settings.workers,
            initializer=_prepare_worker,
            initargs=(self._settings, self._log_file, self._decode, self._folder),
            # Spawn, because a fork would copy the driver's threads and memory.
            context=multiprocessing.get_context("spawn"),
        )
        # The first task starts the processes, which then load while the caller continues.
        pool.schedule(_score_chunk, args=([],))
        return pool


def _collect(
    future: Future[list[RewardResult]], indices: list[int], results: dict[int, RewardResult]
) -> list[list[int]]:
    """Stores the results of a finished chunk, and returns the chunks that are still to be scored."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        raise error
    if error is None:
        scored = future.result()
        results.update(zip(indices, scored, strict=False))
        return [indices[len(scored) :]] if len(scored) < len(indices) else []
    if isinstance(error, ProcessExpired) and error.exitcode == WORN_OUT:
        return [indices]
    if len(indices) > 1:
        # One of the samples hung or crashed. From now on each of them is scored alone.
        return [[index] for index in indices]
    results[indices[0]] = _failure(error)
    return []


def _failure(error: BaseException) -> RewardResult:
    if isinstance(error, TimeoutError):
        return RewardResult(0.0, detail="took too long", outcome="timeout")
    detail = f"{type(error).__name__}: {plain_text(error)}"
    if isinstance(error, ProcessExpired):
        code = error.exitcode
        detail = "out of memory" if code == OUT_OF_MEMORY else f"the verifier's process died with exit code {code}"
    return RewardResult(0.0, detail=detail, outcome="error")


# The code below runs in a worker.

_reward: Reward
_decode: Decode | None
_patience: float
_memory: MemoryLimit


def _prepare_worker(settings: RewardSettings, log_file: Path | None, decode: Decode | None, folder: Path) -> None:
    global _reward, _decode, _patience, _memory
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    if log_file:
        redirect_output(log_file)
    else:
        os.dup2(2, 1)  # the parent's stdout belongs to its progress view
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action, in the kernel: a handler in Python would wait for a verifier that is stuck in C code.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _reward, _decode = load_reward(settings), decode
    if prepare := getattr(_reward, "prepare", None):
        prepare()  # slow imports must not count as the time of the first sample
    _patience = 2 * settings.timeout_seconds + CHUNK_SECONDS
    _memory = MemoryLimit(settings.memory_mb)


def _score_chunk(samples: list[Sample]) -> list[RewardResult]:
    """Returns the results of the first samples: all of them, unless CHUNK_SECONDS run out."""
    results: list[RewardResult] = []
    started = time.monotonic()
    if samples and _memory.worn_out():
        os._exit(WORN_OUT)
    for sample in samples:
        # If the parent dies while a verifier hangs, only the kernel is left to kill this process.
        signal.setitimer(signal.ITIMER_REAL, _patience)
        results.append(_score(sample))
        if time.monotonic() - started > CHUNK_SECONDS or _memory.worn_out():
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    return results


def _score(sample: Sample) -> RewardResult:
    text = ""
    try:
        text = text_of(sample, _decode)
        return replace(result_of(_reward(replace(sample, text=text))), text=text)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # a verifier may raise SystemExit, and libraries in Rust raise such exceptions
        failure = _failure(error)
        return replace(failure, detail=failure.detail + _place(error), text=text)


def _place(error: BaseException) -> str:
    """Returns the line of the user's own reward from which the error came; "" for an error in this package."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames or frames[0].filename.startswith(PACKAGE):
        return ""
    line = [frame.lineno for frame in frames if frame.filename == frames[0].filename][-1]
    return f" ({Path(frames[0].filename).name}, line {line})"


class MemoryLimit:
    """Limits the writable memory of this process to `megabytes` (RLIMIT_DATA)."""

    def __init__(self, megabytes: int) -> None:
        self._limit = megabytes * 2**20
        self._loaded = _writable_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (self._limit, self._limit))

    def worn_out(self) -> bool:
        """Whether half of the memory that was free after loading is used up, so that the process should be replaced
        before a sample is blamed."""
        return _writable_bytes() - self._loaded > (self._limit - self._loaded) / 2


def _writable_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[5]
    return int(pages) * resource.getpagesize()
