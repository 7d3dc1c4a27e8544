import multiprocessing
import socket
from datetime import timedelta
from multiprocessing.connection import Connection

import psutil
import pytest
from torch.distributed import DistNetworkError

from megatron_rl.utils.rendezvous import open_port, store_at
from tests.meeting import HOST

SOON, AT_ONCE = timedelta(seconds=30), timedelta(seconds=1)


def come(port: int, answer: Connection) -> None:
    store = store_at(HOST, port, SOON)
    store.set("come", "yes")
    answer.send(store.get("seen"))


def test_processes_find_each_other() -> None:
    port = open_port(HOST)
    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=come, args=(port, theirs))
    other.start()
    try:
        store = store_at(HOST, port, SOON)
        assert store.get("come") == b"yes"
        store.set("seen", "you")
        assert ours.poll(30) and ours.recv() == b"you"
    finally:
        other.kill()
        other.join()


def test_the_port_is_held_from_the_start_and_at_that_address_alone() -> None:
    port = open_port(HOST)
    with pytest.raises(OSError, match="in use"):
        socket.create_server((HOST, port))
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == [HOST]
    store_at(HOST, port, AT_ONCE)


def test_where_nobody_opened_a_port_it_says_so_in_time() -> None:
    with socket.socket() as taken:  # and no one listens
        taken.bind((HOST, 0))
        with pytest.raises(DistNetworkError):
            store_at(HOST, taken.getsockname()[1], AT_ONCE)
