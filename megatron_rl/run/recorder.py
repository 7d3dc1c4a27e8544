"""Records a run's rollouts at the steps that are due, unless that would take too large a share of the time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.observability.record import CANDIDATES, Cost, candidate_positions, record, write_candidates
from megatron_rl.observability.timing import Phases
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.batch import TrainingBatch

if TYPE_CHECKING:
    from megatron_rl.cluster.actors import Actors


class Recorder:
    """Writes dumps of rollouts and next-token candidates into the run's folder."""

    def __init__(self, config: Config, folder: Path, actors: Actors, phase: Phases) -> None:
        self.config, self.folder, self.actors, self.phase = config, folder, actors, phase
        self.cost = Cost()

    def record(self, step: int, rollouts: Rollouts, batch: TrainingBatch) -> None:
        """Writes a dump if one is due. A dump that would take too long is skipped, unless every step must have one."""
        settings = self.config.observability
        due = settings.rollouts_every and (step == 1 or step % settings.rollouts_every == 0)
        if not due or not (settings.rollouts_every == 1 or self.cost.affordable):
            return
        with self.phase("record"):
            record(
                self.folder / "rollouts",
                step,
                rollouts,
                batch.sequences,
                batch.advantages,
                batch.scores,
                most_tokens=settings.rollouts_tokens,
            )
            if self.config.actor.context_parallel == 1:
                part = candidate_positions(batch.sequences, step)
                temperature = self.config.rollout.temperature
                found = self.actors.candidates(part, temperature=temperature, count=CANDIDATES)
                write_candidates(self.folder / "candidates", step, part, found)
