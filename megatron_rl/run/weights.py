"""Opens the transport that brings new weights to the engines of a run."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from typing import cast, get_args

from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.weight_sync import CollectiveSync, FolderSync, WeightSync
from megatron_rl.config import Config
from megatron_rl.config.transport import transport_of
from megatron_rl.observability.view import View
from megatron_rl.weight_sync.folder import shared_folder
from megatron_rl.weight_sync.transport import GroupTransport


def open_weight_sync(config: Config, actors: Actors, engines: Engines, view: View, stack: ExitStack) -> WeightSync:
    """Returns the weight sync of the configured transport. Closing the stack removes its files and shared memory."""
    settings, server = config.weight_sync, config.rollout.server
    ranks = server.tensor_parallel
    bucket_bytes = settings.bucket_megabytes * 2**20
    transport = transport_of(config)
    if transport in get_args(GroupTransport):
        sync: WeightSync = CollectiveSync(
            actors,
            engines,
            ranks,
            view.message,
            backend="gloo" if config.actor.device == "cpu" or transport == "cuda_ipc" else "nccl",
            bucket_bytes=bucket_bytes,
            update_seconds=server.update_seconds,
            transport=cast(GroupTransport, transport),
        )
    else:
        folder = None  # one on each node, which the ranks make and remove
        if transport == "disk":
            folder = (settings.folder or config.run.folder / "weights").resolve()
        elif config.cluster.nodes == 1:
            folder = shared_folder()
        if folder is not None:
            stack.callback(partial(shutil.rmtree, folder, ignore_errors=True))
        sync = FolderSync(actors, engines, ranks, view.message, folder=folder, bucket_bytes=bucket_bytes)
    stack.callback(sync.close)
    return sync
