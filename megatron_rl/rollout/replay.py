"""Training on rollouts that another run recorded, without engines: the same responses, to study a loss."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.dump import dumps
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.types import AgentResponse, AgentSequence, Prompt, Response, RewardResult


class Replay:
    """Replays one recorded step per step, in order."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds dumps, or is the folder of a run with dumps. Raises UserError if there are none."""
        self.folder = folder
        self._dumps = dumps(folder) or dumps(folder / "rollouts")
        if not self._dumps:
            raise UserError(
                f"{folder} holds no rollout dumps (step_*.parquet): record some with observability.rollouts_every=1"
            )

    def __len__(self) -> int:
        """Number of recorded steps."""
        return len(self._dumps)

    def collect(self, step: int, weight_version: int) -> Rollouts:
        """Returns the recorded rollouts of this run's step 1, 2, ..., with the groups and scores that they had."""
        recorded, path = self._dumps[step - 1]
        try:
            rows = pq.ParquetFile(path).read().to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not a readable rollout dump ({error})") from error
        if not rows:
            raise UserError(f"{path} (step {recorded}) holds no responses")
        if "prompt_token_ids" not in rows[0]:
            raise UserError(f"{path} (step {recorded}) has no column prompt_token_ids: record the rollouts again")
        parts = groupby(sorted(rows, key=_group_of), key=_group_of)
        groups = [_group(number, list(part)) for number, part in parts]
        return Rollouts(groups, np.ones(len(groups), dtype=bool), weight_version=None)

    @property
    def pending(self) -> list[Group]:
        """A replayed step leaves nothing to later ones."""
        return []


def _group_of(row: dict[str, Any]) -> int:
    return int(row["group"])


def _rollout_of(numbered: tuple[int, dict[str, Any]]) -> int:
    place, row = numbered
    number = row.get("rollout")  # an old dump has one row per response
    return place if number is None else int(number)


def _group(number: int, rows: list[dict[str, Any]]) -> Group:
    first = rows[0]
    rollouts = [[row for _, row in part] for _, part in groupby(enumerate(rows), key=_rollout_of)]
    return Group(
        number=number,
        row=number,
        prompt=Prompt(first["prompt_id"], tuple(first["prompt_token_ids"]), first["prompt"], label=None),
        since=first["weight_version"],
        responses=tuple(_answer(part, first["prompt_token_ids"]) for part in rollouts),
        rewards=tuple(
            RewardResult(
                row["reward"] or 0.0, row["answer"], row["detail"], row.get("outcome") or "score", row["response"]
            )
            for row, *_ in rollouts
        ),
    )


def _answer(rows: list[dict[str, Any]], prompt: list[int]) -> Response:
    """One response, from the rows of its sequences."""
    *older, newest = rows
    calls = newest.get("tool_calls")  # an old dump does not have it
    if calls is None and not older and newest["prompt_token_ids"] == prompt:
        return Response(**_fields(newest))
    others = tuple(AgentSequence(**_fields(row), context=tuple(row["prompt_token_ids"])) for row in older)
    context, errors = tuple(newest["prompt_token_ids"]), newest.get("tool_errors")
    return AgentResponse(
        **_fields(newest), context=context, others=others, tool_calls=calls or 0, tool_errors=errors or 0
    )


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    names = ("token_ids", "log_probs", "finish_reason", "weight_version", "sampled_mask")
    return {name: row[name] for name in names if name in row}  # old dumps have no mask
