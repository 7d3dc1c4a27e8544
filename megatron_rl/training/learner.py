"""The objects that the updates of a step work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.arrays import Mask
from megatron_rl.training.batch import TrainingBatch

if TYPE_CHECKING:
    import lpreg
    from megatron_rl.cluster.actors import Actors
    from megatron_rl.config import Config
    from megatron_rl.config.passes import Passes


@dataclass
class Learner:
    """The actor with its loss, and the passes that the configuration needs."""

    config: Config
    actors: Actors
    loss: lpreg.PolicyLoss
    passes: Passes
    weight_version: int = 0
    """Number of optimizer updates that the actor's weights have had."""
    entropy_coefficient: float | None = None
    """Weight of the entropy bonus in the next update, if the loss adapts it; None before the first one."""

    @property
    def temperature(self) -> float:
        """Temperature of the log-probs, which is that of sampling."""
        return self.config.rollout.temperature

    def trained(self, batch: TrainingBatch) -> Mask:
        """[N], True for sequences that an update trains. The loss's denominator counts other counted sequences all the
        same."""
        if not self.config.train.drop_zero_advantage or self.loss.acts_without_advantage:
            return batch.counted
        return np.asarray(batch.counted & (batch.advantages != 0))
