"""Searches for layouts of the same run on the same GPUs that fit: the fastest first, or the nearest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_rl.config import Config
from megatron_rl.config.actor import RecomputeSettings
from megatron_rl.errors import UserError
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.rollout.engines.kind import engine_kind

POWERS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings of one layout."""

    tensor: int
    pipeline: int
    data: int
    recompute: str
    offload: bool
    engines: int
    engine_tensor: int

    @classmethod
    def of(cls, config: Config) -> Choice:
        actor, rollout = config.actor, config.rollout
        return cls(
            actor.tensor_parallel,
            actor.pipeline_parallel,
            actor.data_parallel,
            actor.recompute.granularity,
            actor.offload_optimizer,
            rollout.engines,
            rollout.server.tensor_parallel,
        )

    @property
    def overrides(self) -> list[str]:
        """The settings as overrides for the command line."""
        return [
            f"actor.tensor_parallel={self.tensor}",
            f"actor.sequence_parallel={'true' if self.tensor > 1 else 'false'}",
            f"actor.pipeline_parallel={self.pipeline}",
            f"actor.data_parallel={self.data}",
            f"actor.recompute.granularity={self.recompute}",
            f"actor.offload_optimizer={'true' if self.offload else 'false'}",
            f"rollout.engines={self.engines}",
            f"rollout.server.tensor_parallel={self.engine_tensor}",
        ]

    def apply(self, config: Config) -> Config:
        actor = config.actor.model_copy(
            update={
                "tensor_parallel": self.tensor,
                "sequence_parallel": self.tensor > 1,
                "pipeline_parallel": self.pipeline,
                "data_parallel": self.data,
                "recompute": RecomputeSettings(
                    granularity=self.recompute,  # type: ignore[arg-type]
                    modules=config.actor.recompute.modules,
                ),
                "offload_optimizer": self.offload,
            }
        )
        server = config.rollout.server.model_copy(update={"tensor_parallel": self.engine_tensor})
        rollout = config.rollout.model_copy(update={"engines": self.engines, "server": server})
        return config.model_copy(update={"actor": actor, "rollout": rollout})

    def distance(self, other: Choice) -> int:
        """Number of settings that differ. Degrees of parallelism count twice, recompute and offloading once."""
        parts = ("tensor", "pipeline", "data", "engines", "engine_tensor")
        layout = sum(getattr(self, name) != getattr(other, name) for name in parts)
        return 2 * layout + (self.recompute != other.recompute) + (self.offload != other.offload)


def layouts(setup: Setup) -> list[tuple[Choice, Plan]]:
    """Returns all layouts that fit, the fastest first. Offloading is used only where a layout needs it to fit."""
    found = {choice: plan for choice in _choices(setup) if (plan := _fitting(setup, choice))}
    useful = [(c, p) for c, p in found.items() if not (c.offload and replace(c, offload=False) in found)]
    return sorted(useful, key=lambda pair: pair[1].step_seconds)


def nearest(setup: Setup, count: int = 3) -> list[tuple[Choice, Plan]]:
    """Returns the layouts that fit and change the fewest settings; the faster one first if they are equal."""
    here = Choice.of(setup.config)
    return sorted(layouts(setup), key=lambda pair: (pair[0].distance(here), pair[1].step_seconds))[:count]


def _choices(setup: Setup) -> Iterator[Choice]:
    """Yields the candidate layouts.

    Degrees of parallelism are powers of two. The engines get all GPUs that the actor leaves, or share all GPUs with it
    (`cluster.colocate`). Context parallelism is not changed.
    """
    cluster, rollout = setup.config.cluster, setup.config.rollout
    gpus, elsewhere = cluster.nodes * cluster.gpus_per_node, bool(rollout.server.urls)
    embedded = engine_kind(rollout.engine).embedded
    for tensor, pipeline, data in product(POWERS, POWERS, range(1, gpus + 1)):
        left = gpus - tensor * pipeline * data * setup.config.actor.context_parallel
        if cluster.colocate and setup.placement.on_gpu:
            left = gpus if left == 0 else -1
        if left < 0 or tensor > cluster.gpus_per_node or pipeline > setup.model.layers or setup.sequences % data:
            continue
        if elsewhere and left:
            continue
        for engine_tensor in (rollout.server.tensor_parallel,) if elsewhere or embedded else POWERS:
            engines = rollout.engines if elsewhere else min(left // engine_tensor, rollout.prompts_per_step)
            if engines < 1 or engine_tensor > cluster.gpus_per_node or (not elsewhere and left % engine_tensor):
                continue
            for recompute, offload in product(("none", "selective", "full"), (False, True)):
                yield Choice(tensor, pipeline, data, recompute, offload, engines, engine_tensor)


def _fitting(setup: Setup, choice: Choice) -> Plan | None:
    changed = replace(setup, config=choice.apply(setup.config))
    try:
        changed.check()
    except UserError:
        return None
    plan = Plan(changed)
    return None if plan.problems else plan
