"""What every rollout engine can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.types import Generation, SamplingParams
from megatron_rl.weight_sync.transport import WeightUpdate


class RolloutEngine(Protocol):
    """Token ids in, token ids out. Log-probs are those of the untruncated policy at the sampling temperature."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Generation]]:
        """`sampling.n` responses for each prompt, in the prompts' order."""
        ...

    def update_weights(self, update: WeightUpdate) -> dict[str, int]:
        """Take the weights in place; the next token is sampled from them. Returns the checksum of each tensor taken."""
        ...

    def pause(self) -> None:
        """Finish what runs and take no new request until `resume`."""
        ...

    def resume(self) -> None: ...

    def health(self) -> int:
        """The weight version being served; raises when the engine cannot serve."""
        ...
