"""What every rollout engine can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.types import Generation, SamplingParams
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import GroupMember, WeightUpdate


class EngineLost(Exception):
    """The engine is gone, hangs or fails: nothing more will come from it. Says why."""


class UpdateFailed(Exception):
    """The engine is well, but has half of an update: it serves again when it has the whole of one."""


class RolloutEngine(Protocol):
    """Token ids in, token ids out. Log-probs are those of the untruncated policy at the sampling temperature.

    An engine that is a server has the same methods as coroutines.
    """

    def start(self) -> None:
        """Return when it can serve."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        begun: Sequence[Sequence[Generation]] = (),
        enough: int | None = None,
    ) -> list[list[Generation]]:
        """`sampling.n` responses for each prompt, in the prompts' order.

        begun: for each prompt, `sampling.n` responses to go on with, or none. enough: stop when so many groups are
        whole; what is unfinished then has the finish reason abort. For embedded engines; servers are `cut`.
        """
        ...

    def cut(self) -> None:
        """End every `generate` under way with what there is; servers only."""
        ...

    def update_weights(self, update: WeightUpdate) -> None:
        """Take the weights, while paused; the next token is sampled from them. Raises UpdateFailed."""
        ...

    def verify_weights(self, version: int, sent: Checksums) -> int:
        """Compare the weights held with those sent; returns how many tensors. Raises WeightsDamaged."""
        ...

    def join_groups(self, members: Sequence[GroupMember]) -> None:
        """Be in these groups, and no longer in others, for updates that are broadcast; servers only."""
        ...

    def pause(self) -> None:
        """Nothing is generated from here on until `resume`."""
        ...

    def resume(self) -> None: ...

    def release_memory(self) -> None:
        """Pause, and leave the GPU to others; `update_weights` and `resume` take it back."""
        ...

    def health(self) -> int:
        """The weight version being served; raises when the engine cannot serve."""
        ...

    def close(self) -> None: ...
