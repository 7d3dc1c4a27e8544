"""The coefficient of an entropy bonus that a method adapts, kept between updates and in TRL's checkpoints."""

from __future__ import annotations

import math
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from lpreg import PolicyLoss


class EntropyCoefficient(TrainerCallback, ExportableState):
    """The coefficient of the next update, the same on every rank; None for the method's own first one.

    transformers writes the state of this callback into trainer_state.json. A resumed run reads it from there, whatever
    `restore_callback_states_from_checkpoint` says, because another coefficient would be another loss.
    """

    def __init__(self) -> None:
        self.value: float | None = None

    def adapt(self, loss: PolicyLoss, entropy: float) -> None:
        """Follows an update. entropy: mean over the update's tokens on all ranks, in nats; NaN without tokens."""
        if math.isfinite(entropy):
            self.value = loss.next_entropy_coefficient(self.value, entropy)

    def state(self) -> dict[str, Any]:
        """Returns what transformers keeps."""
        return {"args": {}, "attributes": {"value": self.value}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Takes the value of the checkpoint that the run resumes from."""
        saved: Any = state.stateful_callbacks
        if state.global_step and type(self).__name__ in saved:
            self.value = saved[type(self).__name__]["attributes"]["value"]
