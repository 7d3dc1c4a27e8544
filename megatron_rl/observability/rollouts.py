"""Dumps of rollouts: what was asked, answered and rewarded at a step, as parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.types import Sample
from megatron_rl.utils.files import atomically

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("answer", pa.string()),
        ("detail", pa.string()),
        ("outcome", pa.string()),
        ("advantage", pa.float64()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("weight_versions", pa.list_(pa.int64())),
    ]
)


def write_rollouts(
    folder: Path,
    step: int,
    samples: Sequence[Sample],
    advantages: Sequence[float],
    per_token: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """Write `folder/step_000010.parquet`, a row a sample, and return its path.

    advantages: one a sample. per_token: column name -> one array a sample, over the response's tokens.
    Errors: ValueError when lengths differ; UserError when the file cannot be written.
    """
    if len(advantages) != len(samples):
        raise ValueError(f"{len(advantages)} advantages for {len(samples)} samples")
    table = pa.Table.from_pylist(
        [_row(step, sample, advantage) for sample, advantage in zip(samples, advantages, strict=True)], schema=SCHEMA
    )
    for name, arrays in (per_token or {}).items():
        if name in table.column_names:
            raise ValueError(f"per-token column {name!r}: there is a column of that name already")
        table = table.append_column(name, _per_token_column(name, arrays, samples))
    path = folder / f"step_{step:06d}.parquet"
    with atomically(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def dumps(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every dump in a run's `rollouts` folder, by step."""
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.parquet")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _row(step: int, sample: Sample, advantage: float) -> dict[str, Any]:
    generation, reward = sample.generation, sample.reward
    return {
        "step": step,
        "group": sample.group,
        "prompt_id": sample.prompt.id,
        "prompt": sample.prompt.text,
        "prompt_token_ids": sample.prompt.token_ids,
        "response": sample.text,
        "token_ids": generation.token_ids,
        "log_probs": generation.log_probs,
        "reward": None if reward is None else reward.score,
        "answer": None if reward is None else reward.answer,
        "detail": None if reward is None else reward.detail,
        "outcome": None if reward is None else reward.outcome,
        "advantage": float(advantage),
        "finish_reason": generation.finish_reason,
        "weight_version": generation.weight_version,
        "weight_versions": generation.weight_versions,
    }


def _per_token_column(name: str, arrays: Sequence[Any], samples: Sequence[Sample]) -> pa.Array:
    values = [np.asarray(array) for array in arrays]
    if [len(value) for value in values] != [len(sample.generation.token_ids) for sample in samples]:
        raise ValueError(f"per-token column {name!r}: not one value a response token")
    # Joined first, so that empty responses cannot change the column's type.
    flat = np.concatenate(values) if values else np.empty(0, dtype=np.float32)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
