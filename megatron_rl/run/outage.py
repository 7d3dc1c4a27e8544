"""If no engine can be brought back, a run stops with a checkpoint, so that only time is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_rl.checkpoint.manifest import checkpoints, step_of
from megatron_rl.cluster.engines import EnginesLost
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.run.run import Run


@contextmanager
def checkpoint_on_outage(run: Run) -> Iterator[None]:
    """Turns EnginesLost into a UserError that says how to continue the run."""
    try:
        yield
    except EnginesLost as error:
        raise UserError(f"{error}. {_saved(run)}") from error


def _saved(run: Run) -> str:
    """Makes sure that the last finished step has a checkpoint, and returns how to continue from it.

    The step in progress is repeated then.
    """
    if run.step == 0 or not run.keeps_weights:
        return "There is no finished step yet to continue from"
    if run.last_step:  # without one, the run has just been resumed, from a checkpoint that exists
        run.saver.wait()
        state, metrics, pending = run.last_step
        if state.step not in map(step_of, checkpoints(run.folder / "checkpoints")):
            run.saver.save(state, metrics, pending, background=False)
    return f"To continue after step {run.step}: the same command with run.folder={run.folder} resume=auto"
