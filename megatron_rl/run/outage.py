"""When no engine can be brought back, a run stops with a checkpoint, so that only time is lost."""

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
    """Turns EnginesLost into a UserError that says where the run can go on from."""
    try:
        yield
    except EnginesLost as error:
        raise UserError(f"{error}. {_saved(run)}") from error


def _saved(run: Run) -> str:
    """A checkpoint is of whole steps: the one under way is made again."""
    if run.step == 0 or not run.keeps_weights:
        return "There is no step yet to go on from"
    if run.last_step:  # else it has been resumed, from a checkpoint that is there
        run.saver.wait()
        state, metrics = run.last_step
        if state.step not in map(step_of, checkpoints(run.folder / "checkpoints")):
            run.saver.save(state, metrics, background=False)
    return f"To go on after step {run.step}: the same command with run.folder={run.folder} resume=auto"
