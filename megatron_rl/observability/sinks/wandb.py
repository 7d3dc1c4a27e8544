"""Metrics for Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.config.observability import WandbSettings


class WandbSink:
    """Writes to a W&B run. Its id is derived from the run's folder, so that a resumed run continues in the same one."""

    def __init__(self, settings: WandbSettings, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=name,
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
