"""The receiver of mapped weights and of changed weights: a custom weight loader inside an SGLang scheduler.

    --custom-weight-loader megatron_rl.rollout.engines.sglang.receiver.load

`/update_weights_from_tensor` then carries no weights, but an order: a tensor with JSON. An order of `join` lists the
groups to join, one per pipeline stage of the actor, and leaves all earlier groups. An order of `take` describes the
bucket that comes next.

SGLang ends if a loader raises an error, and reports success if not. The receiver therefore writes errors to a file.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.receivers import RECEIVERS, TensorReceiver
from megatron_rl.weight_sync.transport import GroupMember

LOADER = f"{__name__}.load"

_receivers: dict[str, TensorReceiver] = {}


class Model(Protocol):
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> object: ...


def join(members: Sequence[GroupMember], ranks: int, failures: Path) -> list[str]:
    """The order for each rank of a server. failures: the file for error messages."""
    joining = [asdict(member) for member in members]
    return [_order({"members": joining, "index": index, "failures": str(failures)}) for index in range(ranks)]


def take(group: str, bucket: Sequence[TensorSpec], ranks: int, failures: Path) -> list[str]:
    """The order to load a bucket that comes over a group, for each rank of a server."""
    return [_order({"group": group, "bucket": [asdict(s) for s in bucket], "failures": str(failures)})] * ranks


def _order(order: dict[str, Any]) -> str:
    """Encodes an order as SGLang takes tensors: a pickle, in which SGLang admits nothing but tensors."""
    message = torch.tensor(list(json.dumps(order).encode()), dtype=torch.uint8)
    return base64.b64encode(pickle.dumps([("order", message)])).decode()


def load(model: Model, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carries out an order; SGLang calls this."""
    ((_, message),) = named_tensors
    order = json.loads(bytes(message.tolist()))
    try:
        if "members" in order:
            _leave()
            for member in (GroupMember(**fields) for fields in order["members"]):
                _receivers[member.name] = RECEIVERS[member.transport](member, order["index"], message.device)
        elif order["group"] not in _receivers:
            raise RuntimeError(f"the receiver is not in the group {order['group']}")
        else:
            with _receivers[order["group"]].bucket([TensorSpec(**spec) for spec in order["bucket"]]) as tensors:
                model.load_weights(tensors)
    except Exception as error:
        with Path(order["failures"]).open("a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        _leave()


def _leave() -> None:
    for receiver in _receivers.values():
        receiver.close()
    _receivers.clear()
