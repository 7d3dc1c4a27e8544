"""Destinations of metrics besides metrics.jsonl. A sink that fails or is slow never stops or delays training."""

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
"""Number of steps that a slow service may lag behind before new steps are dropped."""
CLOSE_SECONDS = 20
"""Longest time that the end of a run waits for a slow service."""


class Sink(Protocol):
    """A destination of finite scalars, in the order of the steps."""

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    settings: ObservabilitySettings, name: str, folder: Path, config: Mapping[str, Any], last_step: int | None
) -> list[Sink]:
    """Returns the sinks that the settings request. `last_step` is the step from which a resumed run continues."""
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
    if trackio := settings.trackio:
        from .trackio import TrackioSink

        sinks.append(InBackground(Guarded("Trackio", lambda: TrackioSink(trackio, name, config))))
    return sinks


class Guarded:
    """Creates a sink at the first write. After a failure it logs one warning and ignores further writes."""

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
            logger.warning(
                "%s gets no more metrics, training continues: %s: %s", self.name, type(error).__name__, error
            )


class InBackground:
    """Writes from a separate thread, so that a service that is slow or hangs does not delay the run."""

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
            logger.warning("%s does not respond: its last metrics are lost", self._sink.name)
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s did not finish in %d s: its last metrics may be lost", self._sink.name, CLOSE_SECONDS)

    def _go(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._sink.write(*item)
        self._sink.close()
