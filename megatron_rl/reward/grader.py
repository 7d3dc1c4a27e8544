"""What grades a batch: a pool of processes, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import RewardResult, Sample

from .pool import RewardPool
from .remote import RemoteReward
from .resolve import load_reward


class Grader(Protocol):
    """Grades batches; a context manager."""

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample, in order, each with a declared outcome."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_reward(settings: RewardSettings) -> None:
    """Raises UserError for a reward that cannot be used here; starts nothing that stays."""
    if settings.name == "remote":
        RemoteReward(settings)
    else:
        load_reward(settings)


def open_grader(settings: RewardSettings, log_file: Path | None = None) -> Grader:
    """The grader that the settings ask for. `log_file` takes what verifiers print. Raises UserError."""
    return RemoteReward(settings) if settings.name == "remote" else RewardPool(settings, log_file)
