"""The tests' own ranks: a failing rank ends the others, and waiting ends if processes do not move."""

from __future__ import annotations

import time

import psutil
import pytest
from torch.multiprocessing import ProcessRaisedException

from tests import ranks
from tests.patience import Patience, Stuck


def sleep_or_fail(rank: int) -> None:
    if rank:
        raise ValueError(f"rank {rank} fails")
    time.sleep(3600)


def square(rank: int, base: int) -> int:
    return (base + rank) ** 2


def endless_loop(rank: int) -> None:
    while True:
        pass


def test_results_come_back_by_rank() -> None:
    assert ranks.run_ranks(square, 3, 2) == [4, 9, 16]


def test_an_error_in_a_rank_is_raised_and_ends_the_others() -> None:
    started = ranks.start(sleep_or_fail, 2)
    with pytest.raises(ProcessRaisedException, match="ValueError: rank 1 fails"):
        ranks.wait(started, "ranks that fail")
    assert not any(psutil.pid_exists(pid) for pid in started.pids())


def test_processes_that_do_not_move_are_stuck() -> None:
    started = ranks.start(sleep_or_fail, 1)
    patience = Patience(started.pids, "a rank that sleeps", window=2.0)
    with pytest.raises(Stuck, match=r"a rank that sleeps: the processes used .*\n(.*\n)*.*sleep_or_fail"):
        while True:
            patience.check()
            time.sleep(0.2)
    end(started)


def test_processes_in_an_endless_loop_are_stuck() -> None:
    started = ranks.start(endless_loop, 1)
    patience = Patience(started.pids, "a rank that loops", ceiling=0.5)
    with pytest.raises(Stuck, match=r"a rank that loops: the processes used \d+ s of processor time\n"):
        while True:
            patience.check()
            time.sleep(0.1)
    end(started)


def end(started: ranks.ProcessContext) -> None:
    for process in started.processes:
        process.kill()
        process.join()
