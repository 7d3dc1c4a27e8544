"""A run that loses processes of its actor is opened again, and goes on from its newest checkpoint as a resume does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megatron_rl.cluster.actors import RanksLost
from megatron_rl.config import Config
from megatron_rl.run.interrupt import Stop

if TYPE_CHECKING:
    from megatron_rl.run.run import Run


@dataclass
class Attempts:
    """The attempts of one run to reach its last step. The `with` block is one attempt, `config` its configuration.

    Everything is opened again: Ray places the ranks anew, on other nodes if the cluster has room there, and the engines
    start again. The steps since the checkpoint are repeated.
    """

    config: Config
    ended: bool = False
    _run: Run | None = None
    _stop: Stop | None = None
    _since: Path | None = None
    """The newest checkpoint at the last restart."""
    _restarts: int = 0
    """Restarts since that checkpoint was written."""
    _loss: RanksLost | None = None
    """The cause of the last restart."""

    def opened(self, run: Run, stop: Stop) -> None:
        self._run, self._stop = run, stop

    def __enter__(self) -> Self:
        self.ended, self._run, self._stop = True, None, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Returns True if the error is lost ranks and there is to be another attempt."""
        if self._loss and self._run is None and isinstance(error, Exception):
            raise RanksLost(f"{self._loss}\nThe run could not be opened again: {error}") from error
        if not isinstance(error, RanksLost):
            return False
        newest = self._run.saver.newest if self._run else None
        if newest and newest != self._since:
            self._since, self._restarts = newest, 0
        limit = self.config.cluster.restarts
        if not self._may_go_on() or self._restarts >= limit:
            raise RanksLost(
                f"{error}\nContinue from the newest checkpoint: the same command with run.folder="
                f"{self.config.run.folder} resume=auto. The run did so by itself {self._restarts} of "
                f"{limit} times since that checkpoint (cluster.restarts)."
            ) from error
        self._restarts, self._loss = self._restarts + 1, error
        print(f"RESTART {self._restarts} of {limit} since the last checkpoint: {error}", flush=True)
        if newest or self.config.resume == "never":  # otherwise it begins where this attempt began
            self.config = self.config.model_copy(update={"resume": "auto"})
        self.ended = False
        return True

    def _may_go_on(self) -> bool:
        """Whether nobody has asked the run to stop, and another attempt would lose nothing but time."""
        stopping = self._stop is not None and self._stop.requested
        return not stopping and (self._run is None or self._run.keeps_weights)
