"""Metrics for TensorBoard, in its own record format, without torch or tensorflow."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardSink:
    """Writes one event file per start of the run."""

    def __init__(self, folder: Path, last_step: int | None) -> None:
        """Opens the event file. TensorBoard hides what was written after `last_step`, where a resumed run continues."""
        now = time.time()
        self._path = folder / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        self._append(wall_time=now, file_version="brain.Event:2")
        if last_step is not None:
            self._append(wall_time=now, step=last_step + 1, session_log={"status": "START"})

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        values = [{"tag": name, "simple_value": float(value)} for name, value in metrics.items()]
        self._append(wall_time=wall_time, step=step, summary={"value": values})

    def close(self) -> None:
        """Does nothing, because every write is already on disk."""

    def _append(self, **event: Any) -> None:
        # EventFileWriter is not used: it loads tensorflow if installed, and its errors occur in a thread of its own.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            RecordWriter(file).write(Event(**event).SerializeToString())
