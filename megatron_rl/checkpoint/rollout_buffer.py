"""The rollout buffer as a file of a checkpoint: prompts in flight, partial responses, and unused complete groups."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.checkpoint.manifest import ShardFile
from megatron_rl.rollout.buffer import Group
from megatron_rl.types import Generation, RewardResult

BUFFER_FILE = "backlog.parquet"

_RESPONSE = pa.struct(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float64())),  # float64 keeps the decimals of a server's answer bit for bit
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("version_changes", pa.list_(pa.list_(pa.int64()))),
    ]
)
_REWARD = pa.struct(
    [("score", pa.float64()), ("answer", pa.string()), ("detail", pa.string()), ("outcome", pa.string())]
)
_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("row", pa.int64()),
        ("since", pa.int64()),
        ("responses", pa.list_(_RESPONSE)),
        ("rewards", pa.list_(_REWARD)),
    ]
)


def write_buffer(folder: Path, groups: Sequence[Group]) -> ShardFile:
    buffer = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist([asdict(group) for group in groups], schema=_SCHEMA), buffer, compression="zstd"
    )
    data = buffer.getvalue().to_pybytes()
    with (folder / BUFFER_FILE).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ShardFile("backlog", len(data), hashlib.sha256(data).hexdigest())


def read_buffer(folder: Path) -> list[Group]:
    """Returns the groups of a verified checkpoint; empty if it has no such file."""
    path = folder / BUFFER_FILE
    return [_group(row) for row in pq.ParquetFile(path).read().to_pylist()] if path.exists() else []


def _group(row: dict[str, Any]) -> Group:
    responses = [
        Generation(**response | {"version_changes": tuple((place, v) for place, v in response["version_changes"])})
        for response in row.pop("responses")
    ]
    rewards = [RewardResult(**reward) for reward in row.pop("rewards")]
    return Group(**row, responses=tuple(responses), rewards=tuple(rewards))
