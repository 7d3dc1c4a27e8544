"""The rollout engines: one process each, prompts shared out evenly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from megatron_rl.cluster.runtime import Nodes, host_process, results
from megatron_rl.types import Generation, Prompt, SamplingParams
from megatron_rl.weight_sync.transport import WeightUpdate

if TYPE_CHECKING:
    from megatron_rl.config.schema import ActorSettings, RolloutSettings


ENGINES = {"transformers": "megatron_rl.rollout.transformers_engine:TransformersEngine"}


class Engines:
    """All rollout engines of a run, behind one call."""

    def __init__(
        self, rollout: RolloutSettings, actor: ActorSettings, model_folder: Path, logs: Path, nodes: Nodes
    ) -> None:
        device = "cpu" if actor.device == "cpu" else "cuda"
        self.engines = [
            host_process(
                ENGINES[rollout.engine],
                (model_folder, device, actor.dtype),
                log_file=logs / f"engine-{i}.log",
                nodes=nodes,
                node=node,
                gpus=nodes.placement.engine_gpus,
            )
            for i, node in enumerate(nodes.placement.engines)
        ]
        results([engine.call.remote("health") for engine in self.engines])

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Generation]]:
        """`sampling.n` responses a prompt, in the prompts' order."""
        count = len(self.engines)
        shares = [range(i, len(prompts), count) for i in range(count)]
        refs = [
            engine.call.remote("generate", [prompts[j].token_ids for j in share], sampling.reseeded(i))
            for i, (engine, share) in enumerate(zip(self.engines, shares, strict=True))
        ]
        groups: list[list[Generation]] = [[] for _ in prompts]
        for share, generations in zip(shares, results(refs), strict=True):
            for j, group in zip(share, generations, strict=True):
                groups[j] = group
        return groups

    def update_weights(self, update: WeightUpdate) -> None:
        """All engines take the update; what they took is compared with what was sent when checksums came with it."""
        received = results([engine.call.remote("update_weights", update) for engine in self.engines])
        for i, checksums in enumerate(received):
            update.verify(checksums, f"engine {i}")

    def close(self) -> None:
        for engine in self.engines:
            ray.kill(engine)
