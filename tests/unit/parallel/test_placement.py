"""Placement of actor ranks and engines on nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.cluster import ClusterSettings
from megatron_rl.errors import UserError
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.placement import Placement, place


def cluster(nodes: int, gpus: int = 8, *, colocate: bool = False) -> ClusterSettings:
    return ClusterSettings(nodes=nodes, gpus_per_node=gpus, colocate=colocate)


def test_ranks_fill_nodes_in_order_and_engines_fill_the_rest() -> None:
    placed = place(Layout(tensor=8, pipeline=2), engines=4, cluster=cluster(4), engine_gpus=4, on_gpu=True)
    assert placed.actors == (0,) * 8 + (1,) * 8
    assert placed.engines == (2, 2, 3, 3)
    assert [placed.gpus(node) for node in placed.nodes] == [8, 8, 8, 8]


def test_engines_first_use_free_gpus_on_the_actors_nodes() -> None:
    assert place(Layout(tensor=4), engines=2, cluster=cluster(2), engine_gpus=2, on_gpu=True).engines == (0, 0)


def test_a_tensor_parallel_group_is_not_split_even_if_gpus_stay_free() -> None:
    placed = place(Layout(tensor=3, data=3), engines=1, cluster=cluster(2), engine_gpus=1, on_gpu=True)
    assert placed.actors == (0,) * 6 + (1,) * 3
    assert placed.engines == (0,)


def test_colocated_engines_stay_on_one_node_and_need_no_gpus_of_their_own() -> None:
    colocated = cluster(2, colocate=True)
    placed = place(Layout(tensor=4, data=4), engines=8, cluster=colocated, engine_gpus=2, on_gpu=True)
    assert placed.shared == tuple((rank, rank + 1) for rank in range(0, 16, 2))
    assert placed.engines == (0,) * 4 + (1,) * 4
    assert [placed.gpus(node) for node in placed.nodes] == [8, 8]
    assert [placed.processes(node) for node in placed.nodes] == [12, 12]
    with pytest.raises(UserError, match=r"rollout.engines: 9 .* room for 8"):
        place(Layout(tensor=4, data=4), engines=9, cluster=colocated, engine_gpus=2, on_gpu=True)
    on_cpu = place(Layout(tensor=2), engines=2, cluster=colocated, engine_gpus=0, on_gpu=False)
    assert on_cpu.shared == ()


def test_a_rank_of_every_node_with_engines_writes_the_weights_of_each_stage() -> None:
    stages_apart = Placement((0, 0, 1, 1), (0, 1), 2, on_gpu=True)
    assert stages_apart.writers(2) == ({0: 0, 1: 2}, {1: 2, 0: 1}), "a rank of the other stage, not always the same one"
    stages_together = Placement((0, 1, 0, 1), (0, 1), 1, on_gpu=True)
    assert stages_together.writers(2) == ({0: 0, 1: 1}, {0: 2, 1: 3}), "a rank of the same stage"
    assert Placement((0, 0), (0,), 2, on_gpu=True).writers(1) == ({0: 0},)
    with pytest.raises(UserError, match=r"needs a rank of the actor on every node.* node 1 has none"):
        Placement((0, 0), (0, 1), 2, on_gpu=True).writers(1)


@given(
    tensor=st.sampled_from([1, 2, 3, 4, 8]),
    groups=st.integers(1, 12),
    engine_gpus=st.sampled_from([1, 2, 4, 8]),
    engines=st.integers(1, 16),
)
def test_no_two_colocated_engines_share_a_gpu(tensor: int, groups: int, engine_gpus: int, engines: int) -> None:
    try:
        placed = place(
            Layout(tensor=tensor, data=groups), engines, cluster(6, colocate=True), engine_gpus=engine_gpus, on_gpu=True
        )
    except UserError:
        return
    used = [rank for ranks in placed.shared for rank in ranks]
    assert len(placed.shared) == engines and len(set(used)) == len(used) == engines * engine_gpus
    for engine, ranks in enumerate(placed.shared):
        assert {placed.actors[rank] for rank in ranks} == {placed.engines[engine]}


def test_an_engine_that_runs_elsewhere_uses_no_gpu() -> None:
    placed = place(Layout(tensor=8), engines=2, cluster=cluster(1), engine_gpus=0, on_gpu=True)
    assert (placed.actors, placed.engines, placed.gpus(0)) == ((0,) * 8, (0, 0), 8)


def test_on_cpu_ranks_and_engines_are_spread_over_all_nodes() -> None:
    placed = place(Layout(tensor=2, data=2), engines=2, cluster=cluster(2), engine_gpus=0, on_gpu=False)
    assert (placed.actors, placed.engines) == ((0, 0, 1, 1), (0, 1))
    assert [placed.gpus(node) for node in placed.nodes] == [0, 0]
    assert [placed.processes(node) for node in placed.nodes] == [3, 3]


@pytest.mark.parametrize(
    ("layout", "engines", "engine_gpus", "words"),
    [
        (Layout(tensor=16), 1, 1, "actor.tensor_parallel is 16, but a node has cluster.gpus_per_node: 8"),
        (Layout(tensor=8), 1, 16, "GPUs of an engine is 16"),
        (Layout(tensor=8, data=2), 1, 1, "more GPUs than cluster.nodes: 2 x cluster.gpus_per_node: 8 = 16"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_with_the_reason(
    layout: Layout, engines: int, engine_gpus: int, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        place(layout, engines, cluster(2), engine_gpus=engine_gpus, on_gpu=engine_gpus > 0)
    assert words in str(caught.value)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(1, 4),
    data=st.integers(1, 4),
    engines=st.integers(1, 8),
    engine_gpus=st.sampled_from([0, 1, 2, 4]),
    nodes=st.integers(1, 8),
)
def test_no_group_is_split_and_no_node_is_overfull(
    tensor: int, pipeline: int, data: int, engines: int, engine_gpus: int, nodes: int
) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, data=data)
    try:
        placed: Placement = place(layout, engines, cluster(nodes), engine_gpus=engine_gpus, on_gpu=engine_gpus > 0)
    except UserError:
        free = [max(0, min(8, 8 * (node + 1) - layout.world_size)) for node in range(nodes)]
        assert layout.world_size > 8 * nodes or sum(gpus // engine_gpus for gpus in free) < engines
        return
    assert len(placed.actors) == layout.world_size and len(placed.engines) == engines
    for start in range(0, layout.world_size, tensor):
        assert len(set(placed.actors[start : start + tensor])) == 1
    assert list(placed.actors) == sorted(placed.actors)
    assert all(placed.gpus(node) <= 8 for node in placed.nodes)
    assert max(placed.nodes) < nodes
