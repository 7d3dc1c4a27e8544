"""Training on rollouts that another run recorded: no engine, the same samples, to look into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError
from megatron_rl.observability.rollouts import dumps
from megatron_rl.types import Generation, Prompt, RewardResult, Sample, SamplingParams


class Replay:
    """One recorded step a step, in order."""

    def __init__(self, folder: Path) -> None:
        """folder: of dumps, or of the run that has them. Raises UserError when there are none."""
        self.folder = folder
        self._dumps = dumps(folder) or dumps(folder / "rollouts")
        if not self._dumps:
            raise UserError(
                f"{folder} holds no rollout dumps (step_*.parquet): record some with observability.rollouts_every=1"
            )

    def __len__(self) -> int:
        """Recorded steps."""
        return len(self._dumps)

    def samples(self, step: int) -> list[Sample]:
        """Of this run's step 1, 2, ...; groups as they were recorded, with the scores they had."""
        recorded, path = self._dumps[step - 1]
        try:
            rows = pq.ParquetFile(path).read().to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not a readable rollout dump ({error})") from error
        if rows and "prompt_token_ids" not in rows[0]:
            raise UserError(f"{path} (step {recorded}) has no column prompt_token_ids: record the rollouts anew")
        return [_sample(row) for row in rows]


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        prompt=Prompt(id=row["prompt_id"], token_ids=tuple(row["prompt_token_ids"]), text=row["prompt"], label=None),
        group=row["group"],
        generation=Generation(
            token_ids=row["token_ids"],
            log_probs=row["log_probs"],
            finish_reason=row["finish_reason"],
            weight_version=row["weight_version"],
        ),
        text=row["response"],
        reward=RewardResult(row["reward"], row["answer"], row["detail"]),
    )


class NoEngines:
    """In the place of a run's engines while it replays."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Never:
        raise UserError("a run that replays rollouts has no engine to sample with")

    def close(self) -> None:
        """Nothing was opened."""
