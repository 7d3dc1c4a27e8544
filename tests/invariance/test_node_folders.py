"""Each node's folder holds all weights, whichever ranks gather, send and write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.config.actor import ActorSettings
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import open_weights
from megatron_rl.parallel.layout import layout_of
from megatron_rl.parallel.placement import Placement
from megatron_rl.weight_sync.folder import PREFIX
from megatron_rl.weight_sync.transport import FolderUpdate
from tests import ranks
from tests.meeting import gathered, meeting_point
from tests.rehearsal.cases import write_model
from tests.tiers import quick_of

SMALL = 3000
"""Bytes of a bucket: the embedding is larger, and other buckets hold several tensors."""
CASES = {
    "stages on different nodes": ("qwen3", {"pipeline_parallel": 2, "tensor_parallel": 2}, (0, 0, 1, 1)),
    "stages across nodes": ("qwen3", {"pipeline_parallel": 2, "data_parallel": 2}, (0, 1, 0, 1)),
    "experts over nodes": ("experts", {"expert_parallel": 2, "data_parallel": 4}, (0, 1, 2, 2)),
}
"""Name -> model, layout, the node of each rank; every node has an engine."""


def run_rank(rank: int, folder: Path, model: Path, actor: dict[str, Any], nodes: tuple[int, ...]) -> dict[str, Any]:
    settings = ActorSettings(device="cpu", dtype="float32", **actor)
    worker = MegatronWorker(settings, layout_of(settings), rank)
    worker.start(*meeting_point(worker, folder / "port"), model)
    worker.load_hf(model)
    placement = Placement(nodes, tuple(sorted(set(nodes))), 0, on_gpu=False)
    writers = placement.writers(settings.pipeline_parallel)
    folders = {node: folder / f"{PREFIX}{node}" for node in set(nodes)}
    worker.connect_weights([{r: folders[node] for node, r in stage.items()} for stage in writers], SMALL)
    sent = gathered([worker.push_weights(version, 1) for version in (1, 2)][-1])
    update = FolderUpdate(2, tuple(part for stage in sent for part in stage.parts), nbytes=sum(s.bytes for s in sent))
    found = {
        node: {name: tensor.clone() for name, tensor in update.at(path).tensors()} for node, path in folders.items()
    }
    checksums = {name for stage in sent for name in stage.checksums.plain}
    gathered(True)  # every rank has read before one removes
    failed = fails_alone(worker, rank, nodes)
    gathered(True)
    worker.disconnect_weights()
    gathered(True)
    left = gathered([path.exists() for path in folders.values()])
    worker.close()
    return {"found": found, "checksums": checksums, "left": left, "bytes": update.nbytes, "failed": failed}


def fails_alone(worker: MegatronWorker, rank: int, nodes: tuple[int, ...]) -> bool:
    """Pushes while the last node's memory is full. Returns whether this rank raised an error that names the folder."""

    def full(tensors: Iterator[Any]) -> None:
        next(tensors)
        raise OSError("no space left")

    assert worker.relay is not None
    if nodes[rank] == nodes[-1]:
        for stage in filter(None, worker.relay._stages):
            stage.folder._written = full  # type: ignore[assignment, method-assign]
    try:
        worker.push_weights(3, 0)
    except UserError as error:
        return f"/{PREFIX}{nodes[rank]}: no space left." in str(error)
    return False


@pytest.mark.parametrize("case", quick_of(CASES, {"stages on different nodes"}))
def test_every_node_has_all_weights(tmp_path: Path, case: str) -> None:
    name, actor, nodes = CASES[case]
    model = tmp_path / "model"
    write_model(model, name, 0)
    expected = {key: tensor.float() for key, tensor in open_weights(model).items()}
    results = ranks.run_ranks(run_rank, len(nodes), tmp_path, model, actor, nodes)
    failed = [node for node, told in zip(nodes, results, strict=True) if told["failed"]]
    assert failed and set(failed) == {nodes[-1]}, "the other ranks neither fail nor wait for ever"
    for told in results:
        assert told["found"].keys() == set(nodes)
        for held in told["found"].values():
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[key].float(), expected[key]) for key in expected)
        assert told["bytes"] == sum(tensor.nbytes for tensor in expected.values())
        assert told["checksums"] == expected.keys()
        assert not any(any(folders) for folders in told["left"]), "the folders are removed"
