"""Where metrics go besides metrics.jsonl. None of them can stop training: not by failing, not by being slow."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron_rl.config.observability import ObservabilitySettings

logger = logging.getLogger(__name__)

WAITING_STEPS = 1000
"""Steps that a slow service may lag behind before the newest ones are dropped."""
CLOSE_SECONDS = 20
"""How long the end of a run waits for a slow service."""


class Sink(Protocol):
    """Takes finite scalars, step after step."""

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    settings: ObservabilitySettings, name: str, folder: Path, config: Mapping[str, Any], last_step: int | None
) -> list[Sink]:
    """Those that the settings ask for. last_step: of a resumed run, the step that it goes on from."""
    sinks: list[Sink] = []
    if settings.tensorboard:
        from .tensorboard import TensorBoardSink

        sinks.append(Guarded("TensorBoard", lambda: TensorBoardSink(folder / "tensorboard", last_step)))
    if wandb := settings.wandb:
        from .wandb import WandbSink

        sinks.append(InBackground(Guarded("Weights & Biases", lambda: WandbSink(wandb, name, folder, config))))
    if mlflow := settings.mlflow:
        from .mlflow import MlflowSink

        sinks.append(InBackground(Guarded("MLflow", lambda: MlflowSink(mlflow, name, folder))))
    return sinks


class Guarded:
    """Makes the sink at the first write. When it fails it warns once, then stays silent."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name = name
        self._make = make
        self._sink: Sink | None = None
        self._failed = False

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        def go() -> None:
            self._sink = self._sink or self._make()
            self._sink.write(step, wall_time, metrics)

        self._try(go)

    def close(self) -> None:
        if self._sink is not None:
            self._try(self._sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            logger.warning("%s gets no more metrics, training goes on: %s: %s", self.name, type(error).__name__, error)


class InBackground:
    """Writes from a thread of its own, so that a service which is slow or hangs costs the run nothing."""

    def __init__(self, sink: Guarded) -> None:
        self._sink = sink
        self._waiting: queue.Queue[tuple[int, float, Mapping[str, float]] | None] = queue.Queue(WAITING_STEPS)
        self._dropped = False
        self._thread = threading.Thread(target=self._go, name=sink.name, daemon=True)
        self._thread.start()

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        try:
            self._waiting.put_nowait((step, wall_time, metrics))
        except queue.Full:
            if not self._dropped:
                logger.warning("%s is %d steps behind: metrics are dropped", self._sink.name, WAITING_STEPS)
            self._dropped = True

    def close(self) -> None:
        try:
            self._waiting.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            logger.warning("%s does not answer: its last metrics are lost", self._sink.name)
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s did not end within %d s: its last metrics may be lost", self._sink.name, CLOSE_SECONDS)

    def _go(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._sink.write(*item)
        self._sink.close()
