"""Graders: a pool of worker processes, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from megatron_rl.config.reward import REMOTE, RewardSettings
from megatron_rl.types import Decode, RewardResult, Sample

from .pool import RewardPool
from .remote import RemoteReward
from .resolve import load_reward


class Grader(Protocol):
    """Grades batches of samples. A grader is a context manager."""

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result per sample, in order, each with a declared outcome and the response's text."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_reward(settings: RewardSettings) -> None:
    """Raises UserError for a reward that cannot be used here. Nothing stays running."""
    if settings.name == REMOTE:
        RemoteReward(settings)
    else:
        load_reward(settings)


def open_grader(settings: RewardSettings, log_file: Path | None = None, decode: Decode | None = None) -> Grader:
    """Returns the configured grader. Raises UserError for a reward that cannot be used.

    Args:
        log_file: receives the output of verifiers.
        decode: turns responses into text; None: every sample already has its text.
    """
    if settings.name == REMOTE:
        return RemoteReward(settings, decode)
    return RewardPool(settings, log_file, decode)
