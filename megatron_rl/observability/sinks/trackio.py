"""Metrics for Trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.config.observability import TrackioSettings


class TrackioSink:
    """Writes to a Trackio run of the run's name, so that a resumed run continues in the same one."""

    def __init__(self, settings: TrackioSettings, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=settings.project,
            name=name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
