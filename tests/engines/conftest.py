"""Real SGLang and vLLM servers on CPU. One of each kind serves most tests; those that break one start their own."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.data.countdown import write_task
from megatron_rl.rollout.servers import guard
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerLaunch
from tests.e2e_cpu.conftest import CommandLine

T = TypeVar("T")
Run = Callable[[Awaitable[T]], T]

KINDS = ("sglang", "vllm")
CONTEXT = 64
"""Tokens: the quickstart's model has no more positions."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue  # pytest hands over the whole collection
        item.add_marker(pytest.mark.engines)
        item.add_marker(pytest.mark.timeout(600))
        if not all(importlib.util.find_spec(kind) for kind in KINDS):
            item.add_marker(pytest.mark.skip(reason="SGLang and vLLM are not installed: make test-engines"))


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all: a server's connections belong to the loop they were opened in."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def run(loop: asyncio.AbstractEventLoop) -> Run[object]:
    return loop.run_until_complete


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's task, with its model: untrained, so nearly every token can be sampled."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Where runs are, with the same task."""
    folder = tmp_path_factory.mktemp("runs")
    write_task(folder / "runs/countdown-task")
    return CommandLine(folder)


@pytest.fixture(scope="session")
def model(task: Path) -> Path:
    return task / "model"


def launch(model: Path, **changes: object) -> ServerLaunch:
    return ServerLaunch(model, "cpu", "float32", 1, CONTEXT, **changes)  # type: ignore[arg-type]


def server_processes(guarding: psutil.Process) -> list[psutil.Process]:
    """Of the server that a guard watches, the first one first."""
    return [process for process in guarding.children(recursive=True) if guard.__file__ not in process.cmdline()]


@pytest.fixture(scope="session", params=KINDS)
def engine(request: pytest.FixtureRequest, run: Run[object], model: Path) -> Iterator[HttpEngine]:
    """It serves the model as it lies on disk, or whatever a test has given it."""
    engine = HttpEngine(request.param, ServerSettings(), launch(model))
    run(engine.start())
    run(engine.resume())
    yield engine
    run(engine.close())
