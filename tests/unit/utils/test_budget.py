"""Budgets of several threads."""

from __future__ import annotations

import resource
import threading

from megatron_rl.utils.bounded import budget


def test_a_budget_that_ends_later_in_another_thread_leaves_no_limit_behind() -> None:
    before, inside, ended = resource.getrlimit(resource.RLIMIT_AS), threading.Event(), threading.Event()

    def work() -> None:
        with budget("the other work", seconds=9, mebibytes=512):
            inside.set()
            ended.wait()

    other = threading.Thread(target=work)
    with budget("the work", seconds=9, mebibytes=512):
        other.start()
        assert not inside.wait(0.2)
    ended.set()
    other.join()
    assert inside.is_set() and resource.getrlimit(resource.RLIMIT_AS) == before
