"""Where the processes of a group find each other: torch's key-value store, listening before anyone is told its port.

A port that is merely found free may be taken by the time it is used; one that is open is ours.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

_opened: dict[int, TCPStore] = {}
"""By port; until this process joins there itself."""


def open_port(host: str) -> int:
    """Start a store at an address of this machine, and at no other. Returns its port."""
    listening = socket.create_server((host, 0))
    port = int(listening.getsockname()[1])
    _opened[port] = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return port


def store_at(host: str, port: int, timeout: timedelta) -> TCPStore:
    """The store that someone's `open_port` started. Raises torch's DistNetworkError where none answers in time."""
    store = _opened.pop(port, None) or TCPStore(host, port, is_master=False, timeout=timeout)
    store.set_timeout(timeout)
    return store
