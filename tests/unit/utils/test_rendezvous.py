import multiprocessing
import socket
from datetime import timedelta
from multiprocessing.connection import Connection

import psutil
import pytest
from torch.distributed import DistNetworkError

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port, store_at
from tests import ranks
from tests.patience import wait_until

LONG, AT_ONCE = timedelta(hours=1), timedelta(seconds=1)


def join(port: int, answer: Connection) -> None:
    store = store_at(LOOPBACK, port, LONG)
    store.set("joined", "yes")
    answer.send(store.get("greeting"))


def test_two_processes_exchange_keys_through_the_store() -> None:
    port = open_port(LOOPBACK)
    ours, theirs = multiprocessing.Pipe()
    other = ranks.context().Process(target=join, args=(port, theirs))
    other.start()
    try:
        store = store_at(LOOPBACK, port, LONG)
        assert store.get("joined") == b"yes"
        store.set("greeting", "hello")
        wait_until(ours.poll, [other.pid or 0], "the other process's answer")
        assert ours.recv() == b"hello"
    finally:
        other.kill()
        other.join()


def test_an_opened_port_is_in_use_at_once_and_on_that_address_only() -> None:
    port = open_port(LOOPBACK)
    with pytest.raises(OSError, match="in use"):
        socket.create_server((LOOPBACK, port))
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == [LOOPBACK]
    store_at(LOOPBACK, port, AT_ONCE)


def test_joining_a_port_without_a_store_fails_within_the_timeout() -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind((LOOPBACK, 0))
        with pytest.raises(DistNetworkError):
            store_at(LOOPBACK, taken.getsockname()[1], AT_ONCE)
