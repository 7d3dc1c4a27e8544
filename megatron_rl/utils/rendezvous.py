"""The rendezvous of a process group: torch's key-value store, which listens before its port is announced.

A port that was only found to be free may be taken by the time it is used. A port that is open cannot be.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

_opened: dict[int, TCPStore] = {}
"""Stores that this process opened, by port, until this process joins them itself."""


def open_port(host: str) -> int:
    """Starts a store that listens on one address of this machine only, and returns its port."""
    listening = socket.create_server((host, 0))
    port = int(listening.getsockname()[1])
    _opened[port] = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return port


def store_at(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Joins the store that `open_port` started. Raises torch's DistNetworkError if no store answers in time."""
    store = _opened.pop(port, None) or TCPStore(host, port, is_master=False, timeout=timeout)
    store.set_timeout(timeout)
    return store
