"""The plan of a run: whether it fits, where each process goes, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_rl.config.transport import transport_of
from megatron_rl.plan.engines import WORK_SPACE, EngineMemory, colocated_memory, engine_memory, told_share
from megatron_rl.plan.memory import RankMemory, actor_memory, host_bytes, node_bytes
from megatron_rl.plan.parameters import model_parameters
from megatron_rl.plan.setup import Setup
from megatron_rl.plan.times import checkpoint_bytes, step_flops, step_seconds, total_seconds
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.utils.hardware import GIB


@dataclass(frozen=True)
class Plan:
    """The plan that follows from a setup. Each part is computed on first access."""

    setup: Setup

    @cached_property
    def actor(self) -> list[RankMemory]:
        """Memory of the actor: one entry per pipeline stage."""
        return colocated_memory(self.setup) if self.setup.placement.shared else actor_memory(self.setup)

    @cached_property
    def engine(self) -> EngineMemory | None:
        """Memory of an engine; None if the engines are servers outside the cluster (`rollout.server.urls`)."""
        return None if self.setup.config.rollout.server.urls else engine_memory(self.setup)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Part of a step -> seconds."""
        return step_seconds(self.setup)

    @property
    def step_seconds(self) -> float:
        return total_seconds(self.setup, self.seconds)

    @property
    def gpus(self) -> int:
        """Number of GPUs of the cluster, used or not."""
        return self.setup.config.cluster.nodes * self.setup.config.cluster.gpus_per_node

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the complete run, without evaluations."""
        return self.gpus * self.step_seconds * self.setup.config.train.steps / 3600

    @property
    def utilisation(self) -> float:
        """Share of the matrix rate of all GPUs that the actor's passes, recompute included, reach over a step."""
        flops = sum(step_flops(self.setup).values())
        return flops / self.gpus / self.setup.gpu.flops / self.step_seconds

    @cached_property
    def problems(self) -> list[str]:
        """Reasons why the run does not fit; empty if it fits."""
        return list(self._problems())

    def _problems(self) -> Iterator[str]:
        gpu = self.setup.gpu
        for rank in self.actor:
            if rank.peak > gpu.memory:
                yield (
                    f"actor, pipeline stage {rank.stage}: a rank needs {rank.peak / GIB:.1f} GiB in the phase "
                    f"{rank.worst!r}, but {gpu.name} has {gpu.memory / GIB:.1f} GiB"
                )
        if self.engine is not None and self.engine.tokens < self.setup.longest_sequence:
            yield (
                f"engine: beside {self.engine.weights / GIB:.1f} GiB of weights the KV cache holds "
                f"{self.engine.tokens:.0f} tokens, but the longest sequence has {self.setup.longest_sequence}; raise "
                "rollout.server.tensor_parallel" + (" or unset cluster.colocate" if self.setup.placement.shared else "")
            )

    @cached_property
    def remarks(self) -> list[str]:
        """Properties of the plan that work but may not be intended."""
        return list(self._remarks())

    def _remarks(self) -> Iterator[str]:
        setup, cluster = self.setup, self.setup.config.cluster
        used = sum(setup.placement.gpus(node) for node in setup.placement.nodes)
        if setup.config.rollout.asynchronous:
            yield "engines sample while the actor trains, so a step takes the longer of the two"
        if setup.placement.on_gpu and used < self.gpus:
            yield f"{self.gpus - used} of {self.gpus} GPUs are not used"
        if transport_of(setup.config) == "delta":
            held = setup.element * model_parameters(setup.model) / GIB
            yield f"every process of a server holds a copy of the model in host memory, {held:.1f} GiB"
        kind = engine_kind(setup.config.rollout.engine)
        option = kind.memory_option if isinstance(kind, ServerKind) else None
        if setup.placement.shared and self.engine is not None and option and told_share(setup.config) is None:
            share = (self.engine.weights + self.engine.cache + WORK_SPACE) / setup.gpu.memory
            yield (
                f"{kind.name} must be told its share of a GPU's memory: "
                f"rollout.server.arguments=[{option}, {share:.2f}]"
            )
        without_engine = used - sum(map(len, setup.placement.shared))
        if setup.placement.shared and without_engine:
            yield f"{without_engine} of {used} GPUs have no engine and are idle during every rollout"
        if self.engine is not None:
            together = self.engine.tokens / (setup.assumed.mean_prompt + setup.lengths.mean())
            mine = setup.sequences / setup.config.rollout.engines
            if together < mine:
                yield f"an engine's cache holds about {together:.0f} of its {mine:.0f} responses, so they take turns"
        if setup.lengths.truncated > 0.2:
            yield f"{setup.lengths.truncated:.0%} of the responses would reach rollout.max_response_tokens"
        sequences = setup.sequences / setup.config.train.updates_per_rollout
        if sequences < 4 * setup.layout.data:
            yield (
                f"an update has {sequences:.0f} sequences for {setup.layout.data} data-parallel replicas, so some "
                "replicas will wait for others"
            )
        if setup.placement.on_gpu and len(setup.placement.nodes) < cluster.nodes:
            yield f"{cluster.nodes - len(setup.placement.nodes)} of {cluster.nodes} nodes are not used"

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values; numbers are in bytes, seconds and operations."""
        setup = self.setup
        return {
            "model": {"family": setup.model.family, "parameters": model_parameters(setup.model)},
            "gpu": {"name": setup.gpu.name, "memory": setup.gpu.memory, "count": self.gpus},
            "fits": not self.problems,
            "problems": self.problems,
            "remarks": self.remarks,
            "placement": {
                "actors": list(setup.placement.actors),
                "engines": list(setup.placement.engines),
                "shared": [list(ranks) for ranks in setup.placement.shared],
            },
            "actor": [
                {
                    "stage": rank.stage,
                    "peak": rank.peak,
                    "phase": rank.worst,
                    "reserved": rank.reserved,
                    "phases": rank.phases,
                    "host": host_bytes(setup, rank.stage),
                }
                for rank in self.actor
            ],
            "node_host": node_bytes(setup),
            "engine": None
            if self.engine is None
            else {"weights": self.engine.weights, "cache": self.engine.cache, "cache_tokens": self.engine.tokens},
            "step": {
                "rows": setup.sequences,
                "tokens": setup.step_tokens,
                "flops": step_flops(setup),
                "seconds": self.seconds,
                "total_seconds": self.step_seconds,
            },
            "run": {
                "steps": setup.config.train.steps,
                "gpu_hours": self.gpu_hours,
                "utilisation": self.utilisation,
                "checkpoint_bytes": checkpoint_bytes(setup),
            },
            "assumed": {name: getattr(setup.assumed, name) for name in setup.assumed.__dataclass_fields__},
        }
