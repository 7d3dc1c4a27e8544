"""Groups that a step leaves to later ones, as a file of a checkpoint: prompts, partial responses, surplus groups."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.checkpoint.manifest import ShardFile
from megatron_rl.errors import UserError
from megatron_rl.reward.decode import text_of
from megatron_rl.rollout.buffer import Group
from megatron_rl.types import AgentResponse, AgentSequence, Decode, Prompt, Response, RewardResult, Sample
from megatron_rl.utils.bounded import read_parquet

BUFFER_FILE = "backlog.parquet"

_REWARD = pa.struct(
    [("score", pa.float64()), ("answer", pa.string()), ("detail", pa.string()), ("outcome", pa.string())]
)


def write_buffer(folder: Path, groups: Sequence[Group]) -> ShardFile:
    """Writes the groups' responses and rewards. Prompts are not written: the training data has them."""
    responses = [response for group in groups for response in group.responses]
    rewards = [[_reward_row(reward) for reward in group.rewards] for group in groups]
    table = pa.table(
        {
            "number": pa.array([group.number for group in groups], pa.int64()),
            "row": pa.array([group.row for group in groups], pa.int64()),
            "since": pa.array([group.since for group in groups], pa.int64()),
            "responses": _lists([len(group.responses) for group in groups], _response_rows(responses)),
            "agents": _lists([len(group.responses) for group in groups], _agent_rows(responses)),
            "rewards": pa.array(rewards, pa.list_(_REWARD)),
        }
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    with (folder / BUFFER_FILE).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ShardFile("backlog", len(data), hashlib.sha256(data).hexdigest())


def read_buffer(folder: Path, prompts: Sequence[Prompt], decode: Decode) -> list[Group]:
    """Reads the groups of a checkpoint that was found intact; there may be none.

    `prompts`: the training data. `decode` restores the text of graded responses. Raises UserError if the file holds
    something else.
    """
    path = folder / BUFFER_FILE
    if not path.exists():
        return []
    try:
        return [_group(row, prompts, decode) for row in read_parquet(path).to_pylist()]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no rollout buffer of this run's data ({error!r}): choose another checkpoint with resume=PATH"
        ) from error


def _reward_row(reward: RewardResult) -> dict[str, Any]:
    return {name: getattr(reward, name) for name in ("score", "answer", "detail", "outcome")}


def _response_rows(responses: Sequence[Response]) -> pa.StructArray:
    lengths = [len(response) for response in responses]
    changes = pa.list_(pa.list_(pa.int64()))
    return pa.StructArray.from_arrays(
        [
            _lists(lengths, _flat([response.token_ids for response in responses], np.int32)),
            _lists(
                [len(response.log_probs) for response in responses],  # 0 if the source reports none
                _flat([response.log_probs for response in responses], np.float64),
            ),
            _lists(lengths, _flat([response.sampled_mask for response in responses], np.bool_)),
            pa.array([response.finish_reason for response in responses], pa.string()),
            pa.array([response.weight_version for response in responses], pa.int64()),
            pa.array([[list(change) for change in response.version_changes] for response in responses], changes),
        ],
        names=["token_ids", "log_probs", "sampled_mask", "finish_reason", "weight_version", "version_changes"],
    )


def _agent_rows(responses: Sequence[Response]) -> pa.StructArray:
    """What rollouts of agents have beside the newest sequence; null for other responses."""
    agents = [response if isinstance(response, AgentResponse) else None for response in responses]
    others = [sequence for agent in agents if agent for sequence in agent.others]
    return pa.StructArray.from_arrays(
        [
            pa.array([agent.context if agent else () for agent in agents], pa.list_(pa.int32())),
            _lists([len(agent.others) if agent else 0 for agent in agents], _response_rows(others)),
            _lists(
                [len(agent.others) if agent else 0 for agent in agents],
                pa.array([sequence.context for sequence in others], pa.list_(pa.int32())),
            ),
            pa.array([agent.tool_calls if agent else 0 for agent in agents], pa.int64()),
            pa.array([agent.tool_errors if agent else 0 for agent in agents], pa.int64()),
            pa.array([agent.graded if agent else None for agent in agents], pa.string()),
        ],
        names=["context", "others", "contexts", "tool_calls", "tool_errors", "graded"],
    )


def _flat(parts: Sequence[Any], dtype: Any) -> pa.Array:
    return pa.array(np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype))


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), values)


def _group(row: dict[str, Any], prompts: Sequence[Prompt], decode: Decode) -> Group:
    agents = row.get("agents") or [{}] * len(row["responses"])  # files of older versions have none
    responses = tuple(_response(*pair) for pair in zip(row["responses"], agents, strict=True))
    graded = zip(row["rewards"], responses, strict=False)
    prompt = prompts[row["row"]]
    return Group(
        number=row["number"],
        row=row["row"],
        prompt=prompt,
        since=row["since"],
        responses=responses,
        rewards=tuple(
            RewardResult(**reward, text=_text(Sample(prompt, response), decode)) for reward, response in graded
        ),
    )


def _response(row: dict[str, Any], agent: dict[str, Any]) -> Response:
    if agent.get("graded") is None:
        return Response(**_fields(row))
    return AgentResponse(
        **_fields(row),
        context=tuple(agent["context"]),
        others=tuple(
            AgentSequence(**_fields(other), context=tuple(context))
            for other, context in zip(agent["others"], agent["contexts"], strict=True)
        ),
        tool_calls=agent["tool_calls"],
        tool_errors=agent["tool_errors"],
        graded=agent["graded"],
    )


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "token_ids": row["token_ids"],
        "log_probs": row["log_probs"],
        "finish_reason": row["finish_reason"],
        "weight_version": row["weight_version"],
        "version_changes": tuple((place, version) for place, version in row["version_changes"]),
        "sampled_mask": row.get("sampled_mask"),
    }


def _text(sample: Sample, decode: Decode) -> str:
    """Returns the response's text; empty if it cannot be decoded, as in its grading."""
    try:
        return text_of(sample, decode)
    except ValueError:
        return ""
