"""NCCL that is gloo, whose collectives take the same arguments."""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    import torch.distributed.distributed_c10d as c10d

    start, group = c10d.init_process_group, c10d.new_group
    isend, irecv = _waited_once(c10d.isend), _waited_once(c10d.irecv)

    def init_process_group(backend: str | None = None, *args: Any, **settings: Any) -> None:
        settings.pop("device_id", None), settings.pop("pg_options", None)
        start("gloo", *args, **settings)

    def new_group(*args: Any, **settings: Any) -> Any:
        settings.pop("device_id", None), settings.pop("pg_options", None)
        if settings.get("backend") == "nccl":
            settings["backend"] = "gloo"
        return group(*args, **settings)

    for module in (c10d, torch.distributed):
        module.init_process_group, module.new_group = init_process_group, new_group
        module.isend, module.irecv = isend, irecv


class _Transfer:
    """A message that may be waited for twice, as with NCCL. Gloo would wait for another message."""

    def __init__(self, work: Any) -> None:
        self._work, self._done = work, False

    def wait(self, *timeout: Any) -> bool:
        self._done = self._done or self._work.wait(*timeout)
        return True

    def is_completed(self) -> bool:
        return self._done or self._work.is_completed()


def _waited_once(transfer: Any) -> Any:
    def start(*args: Any, **settings: Any) -> Any:
        work = transfer(*args, **settings)  # within the mode, torch finds this function again by its name
        return work if work is None or isinstance(work, _Transfer) else _Transfer(work)

    return start
