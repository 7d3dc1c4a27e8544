"""Dumps of rollouts as parquet: the prompts, responses and rewards of a step, with values per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.types import AgentResponse, Prompt, Response, RewardResult
from megatron_rl.utils.files import atomically

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("label", pa.string()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("sampled_mask", pa.list_(pa.bool_())),
        ("log_probs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("answer", pa.string()),
        ("detail", pa.string()),
        ("outcome", pa.string()),
        ("advantage", pa.float64()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("weight_versions", pa.list_(pa.int64())),
        ("rollout", pa.int64()),
        ("tool_calls", pa.int64()),
        ("tool_errors", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class DumpedResponse:
    """One row of a dump."""

    group: int
    prompt: Prompt
    response: Response
    reward: RewardResult
    advantage: float
    rollout: int | None = None
    """Number of the response in its group. The sequences of a response that an agent sampled have a row each; None:
    the row is a response of its own."""


def write_rollouts(
    folder: Path, step: int, rows: Sequence[DumpedResponse], per_token: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Writes `folder/step_000010.parquet`, one row per sequence, and returns its path. A response is one sequence,
    unless an agent sampled it.

    Args:
        per_token: column name -> one array per response, over the response's tokens. `token_ids`, `sampled_mask`,
            `log_probs` and these columns have one value per token of the response, sampled or not.

    Raises:
        ValueError: the lengths of a column differ from those of the responses, or its name is taken.
        UserError: the file cannot be written.
    """
    per_token = per_token or {}
    if taken := sorted(per_token.keys() & set(SCHEMA.names)):
        raise ValueError(f"per-token column {taken[0]!r}: there is a column of that name already")
    responses = [row.response for row in rows]
    tokens: dict[str, Sequence[Any]] = {
        "token_ids": [response.token_ids for response in responses],
        "sampled_mask": [response.sampled_mask for response in responses],
        "log_probs": [response.log_probs for response in responses],
        "weight_versions": [response.weight_versions for response in responses],
    }
    table = pa.Table.from_pylist(
        [_row(step, row) for row in rows], schema=pa.schema(field for field in SCHEMA if field.name not in tokens)
    )
    for name, arrays in {**tokens, **per_token}.items():
        column = _per_token_column(name, arrays, responses)
        if name in tokens:
            field = SCHEMA.field(name)
            table = table.add_column(SCHEMA.names.index(name), field, column.cast(field.type))
        else:
            table = table.append_column(name, column)
    path = folder / f"step_{step:06d}.parquet"
    with atomically(path) as partial:
        # A dictionary does not pay for values per token, which mostly differ.
        once = [name for name in table.column_names if not pa.types.is_list(table.schema.field(name).type)]
        pq.write_table(table, partial, compression="zstd", use_dictionary=once, write_page_checksum=True)
    return path


def dumps(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, file) of every dump in a run's `rollouts` folder, by step."""
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.parquet")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _row(step: int, row: DumpedResponse) -> dict[str, Any]:
    return {
        "step": step,
        "group": row.group,
        "prompt_id": row.prompt.id,
        "prompt": row.prompt.text,
        "prompt_token_ids": row.prompt.token_ids,
        "label": None if row.prompt.label is None else str(row.prompt.label),
        "response": row.reward.text,
        "reward": row.reward.score if row.reward.has_score else None,
        "answer": row.reward.answer,
        "detail": row.reward.detail,
        "outcome": row.reward.outcome,
        "advantage": float(row.advantage),
        "finish_reason": row.response.finish_reason,
        "weight_version": row.response.weight_version,
        "rollout": row.rollout,
        "tool_calls": row.response.tool_calls if isinstance(row.response, AgentResponse) else None,
        "tool_errors": row.response.tool_errors if isinstance(row.response, AgentResponse) else None,
    }


def _per_token_column(name: str, arrays: Sequence[Any], responses: Sequence[Response]) -> pa.Array:
    values = [np.asarray(array) for array in arrays]
    if [len(value) for value in values] != [len(response) for response in responses]:
        raise ValueError(f"per-token column {name!r}: not one value per response token")
    # The arrays are joined first, so that an empty response cannot change the column's type.
    flat: npt.NDArray[Any] = np.concatenate(values) if values else np.empty(0, dtype=np.float32)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
