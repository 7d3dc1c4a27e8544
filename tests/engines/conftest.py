"""Real SGLang and vLLM servers on CPU. Most tests share one server of each kind; tests that break a server start their
own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
import pytest

from megatron_rl.data.countdown import write_task
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import engine_kind
from megatron_rl.rollout.servers import guard
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import UNSYNCED
from tests.e2e_cpu.conftest import CommandLine
from tests.engines.updates import in_folder
from tests.patience import command_of, completed

T = TypeVar("T")
Run = Callable[[Awaitable[T]], T]

KINDS = ("sglang", "vllm")
CONTEXT = 64
"""Context length in tokens, which is that of the quickstart's model."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests, and those with SGLang: `make test-engines` runs these beside the others."""
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue  # pytest passes the whole collection
        item.add_marker(pytest.mark.engines)
        if "sglang" in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
            item.add_marker(pytest.mark.sglang)
        if not all(importlib.util.find_spec(kind) for kind in KINDS):
            item.add_marker(pytest.mark.skip(reason="SGLang and vLLM are not installed: make test-engines"))


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One event loop for all tests: a server's connections belong to the loop in which they were opened."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def run(loop: asyncio.AbstractEventLoop) -> Run[object]:
    return loop.run_until_complete


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's task with its model, which is untrained: nearly every token can be sampled."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A folder for runs, with the same task."""
    folder = tmp_path_factory.mktemp("runs")
    write_task(folder / "runs/countdown-task")
    return CommandLine(folder)


@pytest.fixture(scope="session")
def model(task: Path) -> Path:
    return task / "model"


def launch(kind: str, model: Path, **changes: Any) -> EngineLaunch:
    return EngineLaunch(engine_kind(kind), model, "cpu", "float32", CONTEXT, **changes)


def printed(word: str, *command: str) -> Any:
    """Returns what a module of these tests prints after the word, run in a process of its own: the servers' packages
    change the process that imports them."""
    done = completed([sys.executable, "-m", *command], command[0])
    assert done.returncode == 0, done.stdout
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(word)).removeprefix(word))


def server_processes(guarding: psutil.Process) -> list[psutil.Process]:
    """The processes of the server that a guard watches, in the order of their start."""
    return [process for process in guarding.children(recursive=True) if guard.__file__ not in command_of(process)]


@pytest.fixture(scope="session", params=KINDS)
def engine(request: pytest.FixtureRequest, run: Run[object], model: Path) -> Iterator[HttpEngine]:
    """It serves the model on disk, or the weights that a test has given it."""
    engine = HttpEngine(launch(request.param, model))
    run(engine.start())
    run(engine.resume())
    yield engine
    run(engine.close())


@pytest.fixture
def lent(engine: HttpEngine, run: Run[Any], model: Path, tmp_path: Path) -> Iterator[HttpEngine]:
    """The server that tests share, for a whole run; afterwards it gets the model's weights again."""
    engine._requests.version = UNSYNCED  # the run gives the server weights of its own, which are no reason to lose it
    yield engine
    run(engine.pause())
    run(engine.update_weights(in_folder(tmp_path / "restored", model, 200)[0]))
    run(engine.resume())
