"""Metrics for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.config.observability import MlflowSettings

FOLDER_TAG = "megatron_rl.folder"


class MlflowSink:
    """Writes to an MLflow run that has the run's folder as a tag, so that a resumed run continues in the same one."""

    def __init__(self, settings: MlflowSettings, name: str, folder: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(settings.tracking_uri)
        found = self._client.get_experiment_by_name(settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(settings.experiment)
        tag = str(folder.resolve()).replace("'", "")
        earlier = self._client.search_runs([experiment], f"tags.`{FOLDER_TAG}` = '{tag}'", max_results=1)
        run = earlier[0] if earlier else self._client.create_run(experiment, run_name=name, tags={FOLDER_TAG: tag})
        self._run_id = run.info.run_id

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # MLflow does not allow "@" in names.
        values = [
            Metric(name.replace("@", "_at_"), float(value), int(1000 * wall_time), step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._run_id, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
