"""Digests that are taken beside other work: those of tensors on a CPU in threads, as SHA-256 releases Python's lock.

SHA-256 of the weights of a 32B model takes minutes in one thread, which is longer than sending them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from megatron_rl.weight_sync.digest import digest

THREADS = min(8, os.cpu_count() or 1)
PENDING_BYTES = 2 * 2**30
"""Bytes of tensors whose digests have not been taken yet. The caller waits if there are more, so that a sender that is
faster than its checksums does not hold the model twice."""


class DigestQueue:
    """Takes digests in the order of `add`, several at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "digest")
        self._pending: deque[tuple[Future[str], int]] = deque()
        self._bytes = 0

    def add(self, tensor: Tensor, made: Callable[[], Tensor] | None = None) -> Future[str]:
        """Returns the future digest of a tensor, which must not change before it is taken.

        made: makes the tensor to digest, if that is work of its own; `tensor` then only says how large it is and where
        it lies. Digests of tensors on a GPU are taken at once, in the order of the GPU's other work.
        """
        if tensor.device.type != "cpu":
            done: Future[str] = Future()
            done.set_result(digest(made() if made else tensor))
            return done
        future = self._pool.submit(lambda: digest(made() if made else tensor))
        self._pending.append((future, tensor.nbytes))
        self._bytes += tensor.nbytes
        while self._bytes > PENDING_BYTES:
            oldest, nbytes = self._pending.popleft()
            oldest.result()
            self._bytes -= nbytes
        return future


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Returns the digest of each tensor by name, several taken at a time."""
    queue = DigestQueue()
    futures = {name: queue.add(tensor) for name, tensor in tensors}
    return {name: future.result() for name, future in futures.items()}
