"""Runs torch's profiler around the passes of a step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PHASES = ("forward", "loss", "optimizer")
"""The parts of a step that `record_function` marks. The rest of a step's time is backward and communication."""
TABLE_ROWS = 40


class Profiler:
    """Traces everything that this rank runs on CPU and GPU between `start` and `stop`."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        self._profile.start()

    def stop(self, folder: Path, rank: int) -> None:
        """Writes a trace `rank-0.json.gz` for chrome://tracing or ui.perfetto.dev, and its tables as `rank-0.txt`."""
        self._profile.stop()
        folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(folder / f"rank-{rank}.json.gz"))
        (folder / f"rank-{rank}.txt").write_text(self._tables(), encoding="utf-8")

    def _tables(self) -> str:
        averages = self._profile.key_averages()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        marked = {event.key: event for event in averages if event.key in PHASES}
        lines = [
            f"{name:<12}{event.count:>6} calls {event.cpu_time_total / 1e3:>12.1f} ms (CPU, this thread)"
            for name, event in marked.items()
        ]
        return "\n".join([*lines, "", averages.table(sort_by=f"self_{device}_time_total", row_limit=TABLE_ROWS), ""])
