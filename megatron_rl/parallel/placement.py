"""Which node each actor rank and each engine runs on. Needs no Ray, so that `megatron-rl plan` can show it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.config.cluster import ClusterSettings
from megatron_rl.errors import UserError
from megatron_rl.parallel.layout import Layout, layout_of


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes are numbered from 0. Ranks keep their order, so neighbouring ranks share a node if possible."""

    actors: tuple[int, ...]
    """The node of each actor rank."""
    engines: tuple[int, ...]
    """The node of each engine."""
    engine_gpus: int
    """GPUs per engine; 0 on CPU and for an engine that only calls a server that runs elsewhere."""
    on_gpu: bool
    shared: tuple[tuple[int, ...], ...] = ()
    """For each engine, the actor ranks that it shares GPUs with, taking turns; empty if engines have their own GPUs."""

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes that run at least one rank or engine."""
        return tuple(sorted({*self.actors, *self.engines}))

    def processes(self, node: int) -> int:
        return self.actors.count(node) + self.engines.count(node)

    def gpus(self, node: int) -> int:
        own = 0 if self.shared else self.engine_gpus
        return self.actors.count(node) + self.engines.count(node) * own if self.on_gpu else 0

    def writers(self, stages: int) -> tuple[dict[int, int], ...]:
        """Returns, for each pipeline stage, the rank that writes the stage's weights on each node: the stage's first
        rank, and one rank on every other node with engines, of the same stage if possible.

        Raises UserError if a node has an engine and no rank.
        """
        size = len(self.actors) // stages
        chosen = []
        for stage in range(stages):
            first = stage * size
            writers = {self.actors[first]: first}
            for node in sorted({*self.engines} - writers.keys()):
                here = [rank for rank, place in enumerate(self.actors) if place == node]
                if not here:
                    raise UserError(
                        f"weight_sync.transport: shared_memory needs a rank of the actor on every node with an engine, "
                        f"but node {node} has none. Set weight_sync.transport to disk or collective"
                    )
                own = [rank for rank in here if rank // size == stage]
                writers[node] = own[0] if own else here[stage % len(here)]
            chosen.append(writers)
        return tuple(chosen)


def placement_of(config: Config) -> Placement:
    """Returns the placement of a configured run. Raises UserError if the cluster is too small."""
    on_gpu, server = config.actor.device != "cpu", config.rollout.server
    engine_gpus = server.tensor_parallel if on_gpu and not server.urls else 0
    engines = 0 if config.rollout.replay else config.rollout.engines
    return place(layout_of(config.actor), engines, config.cluster, engine_gpus=engine_gpus, on_gpu=on_gpu)


def place(layout: Layout, engines: int, cluster: ClusterSettings, *, engine_gpus: int, on_gpu: bool) -> Placement:
    """Places tensor-parallel groups in their order, then engines, each on the first node with enough free GPUs.

    No group and no engine is split over two nodes. Engines first fill the GPUs that the actor left free, so that they
    are close to its weights; with `cluster.colocate` they use the actor's own GPUs. On CPU, groups and engines are
    spread evenly over the nodes. Raises UserError if they do not fit.
    """
    groups = layout.world_size // layout.tensor
    if not on_gpu:
        spread = [group * cluster.nodes // groups for group in range(groups)]
        return Placement(
            actors=tuple(node for node in spread for _ in range(layout.tensor)),
            engines=tuple(engine * cluster.nodes // engines for engine in range(engines)),
            engine_gpus=0,
            on_gpu=False,
        )
    free = [cluster.gpus_per_node] * cluster.nodes
    group_nodes = [_reserve(free, layout.tensor, "actor.tensor_parallel", cluster) for _ in range(groups)]
    actors = tuple(node for node in group_nodes for _ in range(layout.tensor))
    if cluster.colocate and engine_gpus and engines:
        shared = _colocate(actors, engines, engine_gpus)
        return Placement(actors, tuple(actors[ranks[0]] for ranks in shared), engine_gpus, on_gpu=True, shared=shared)
    return Placement(
        actors=actors,
        engines=tuple(_reserve(free, engine_gpus, "GPUs of an engine", cluster) for _ in range(engines)),
        engine_gpus=engine_gpus,
        on_gpu=True,
    )


def _colocate(actors: tuple[int, ...], engines: int, engine_gpus: int) -> tuple[tuple[int, ...], ...]:
    """Returns, for each engine, neighbouring actor ranks of one node."""
    blocks: list[tuple[int, ...]] = []
    for node in sorted(set(actors)):
        ranks = [rank for rank, place in enumerate(actors) if place == node]
        usable = len(ranks) // engine_gpus * engine_gpus
        blocks += [tuple(ranks[i : i + engine_gpus]) for i in range(0, usable, engine_gpus)]
    if len(blocks) < engines:
        raise UserError(
            f"rollout.engines: {engines} engines of {engine_gpus} GPUs each share the actor's GPUs (cluster.colocate), "
            f"but its nodes have room for {len(blocks)}; lower it or rollout.server.tensor_parallel, or raise "
            "actor.data_parallel"
        )
    return tuple(blocks[:engines])


def _reserve(free: list[int], gpus: int, what: str, cluster: ClusterSettings) -> int:
    """Reserves GPUs on the first node that has enough free ones. Returns that node. Raises UserError if none has."""
    for node, available in enumerate(free):
        if available >= gpus:
            free[node] -= gpus
            return node
    if gpus > cluster.gpus_per_node:
        raise UserError(
            f"{what} is {gpus}, but a node has cluster.gpus_per_node: {cluster.gpus_per_node}, "
            "and neither a tensor-parallel group nor an engine can be split over two nodes"
        )
    raise UserError(
        f"actor ranks and engines need more GPUs than cluster.nodes: {cluster.nodes} x "
        f"cluster.gpus_per_node: {cluster.gpus_per_node} = {cluster.nodes * cluster.gpus_per_node}; "
        "raise these, or lower actor.*_parallel or rollout.engines"
    )
