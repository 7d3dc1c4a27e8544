"""The rollout engines: memory on each GPU, concurrent responses, and the time that a step's rollouts take."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.config.transport import transport_of
from megatron_rl.errors import UserError
from megatron_rl.models.flops import body_flops, head_flops
from megatron_rl.plan.memory import RankMemory, actor_memory
from megatron_rl.plan.parameters import model_parameters
from megatron_rl.plan.setup import Setup
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.utils.hardware import GIB

WORK_SPACE = 2 * GIB
"""Bytes for activations and CUDA graphs, out of the engine's share of a GPU's memory."""
POINTS = 64
"""Number of positions at which the time of decoding is evaluated."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes that an engine takes on one of its GPUs."""

    weights: float
    cache: float
    """Bytes left for the KV cache; negative if not even the weights fit."""
    token: float
    """Bytes of keys and values per token."""

    @property
    def tokens(self) -> float:
        """Number of tokens that fit into the cache."""
        return max(0.0, self.cache / self.token)


def engine_memory(setup: Setup) -> EngineMemory:
    """Returns the memory of an engine: the share that its arguments give it, or else its usual share of a GPU, less
    what an actor keeps on the same GPU (`cluster.colocate`)."""
    model, ranks = setup.model, setup.config.rollout.server.tensor_parallel
    weights = setup.element * model_parameters(model) / ranks
    key_heads = max(1.0, model.kv_heads / ranks)
    token = 2 * model.layers * key_heads * model.head_dim * setup.element
    told = told_share(setup.config)
    share = (told or engine_kind(setup.config.rollout.engine).memory_share) * setup.gpu.memory
    if setup.placement.shared and told is None:
        share -= max(rank.total("rollout") for rank in actor_memory(setup)) + setup.assumed.released
    return EngineMemory(weights, share - weights - WORK_SPACE, token)


def told_share(config: Config) -> float | None:
    """Returns the share of a GPU's memory that `rollout.server.arguments` give the server, or None."""
    kind, arguments = engine_kind(config.rollout.engine), list(config.rollout.server.arguments)
    option = kind.memory_option if isinstance(kind, ServerKind) else None
    if option is None or option not in arguments[:-1]:
        return None
    try:
        return float(arguments[arguments.index(option) + 1])
    except ValueError as error:
        raise UserError(f"rollout.server.arguments: {option} is followed by no number") from error


def colocated_memory(setup: Setup) -> list[RankMemory]:
    """Returns `actor_memory` with an engine on the same GPUs.

    The engine is awake in the rollout phase, holds only its weights during weight sync, and sleeps in the other phases.
    """
    engine, released = engine_memory(setup), {"the engine's CUDA and NCCL": setup.assumed.released}
    weights = {"the engine's weights": engine.weights}
    awake = weights | {"the engine's cache": max(0.0, engine.cache), "the engine's work space": WORK_SPACE}
    if transport_of(setup.config) == "cuda_ipc":
        weights |= {"the engine's copy of a bucket": setup.config.weight_sync.bucket_megabytes * 2.0**20}
    return [
        RankMemory(
            rank.stage,
            rank.phases
            | {"rollout": rank.phases["rollout"] | awake, "weight sync": rank.phases["weight sync"] | weights},
            rank.reserved | released,
        )
        for rank in actor_memory(setup)
    ]


def rollout_seconds(setup: Setup) -> float:
    """Seconds of prefill and of decoding up to the longest response. All engines have equal shares of the responses.

    If the cache holds fewer responses than an engine has, the responses take turns.
    """
    memory, assumed, gpu = engine_memory(setup), setup.assumed, setup.gpu
    ranks, engines = setup.config.rollout.server.tensor_parallel, setup.config.rollout.engines
    mine = setup.sequences / engines
    limit = setup.config.rollout.max_response_tokens
    width = limit / POINTS
    seconds = 0.0
    for point in range(POINTS):
        position = (point + 0.5) * width
        alive = mine * setup.lengths.longer(position)
        if alive < 0.5:
            break
        context = assumed.mean_prompt + position
        together = min(alive, max(1.0, memory.tokens / context))
        seconds += width * alive / together * decoding_seconds(setup, memory, together, context)
    prompts = mine / setup.config.rollout.samples_per_prompt
    reading = body_flops(setup.model, assumed.mean_prompt, assumed.mean_prompt**2)
    return seconds + prompts * reading / ranks / (gpu.flops * assumed.prefill)


def decoding_seconds(setup: Setup, memory: EngineMemory, together: float, context: float) -> float:
    """Seconds of a decoding step, in which each of `together` responses gets one token.

    context: mean number of tokens before it. A step takes the larger of reading weights and cache and of multiplying,
    plus two sums over the engine's ranks per layer.
    """
    assumed, gpu, ranks = setup.assumed, setup.gpu, setup.config.rollout.server.tensor_parallel
    weights = memory.weights * _read_share(setup, together)
    read = (weights + together * context * memory.token) / (gpu.bandwidth * assumed.decoding)
    flops = body_flops(setup.model, 1, 2 * context) + head_flops(setup.model, 1)
    multiply = together * flops / ranks / (gpu.flops * assumed.prefill)
    return max(read, multiply) + _between_ranks(setup, together)


def _read_share(setup: Setup, together: float) -> float:
    """Expected share of the weights that a decoding step reads: experts that no token is routed to are not read."""
    model, experts = setup.model, setup.model.experts
    if experts is None:
        return 1.0
    sparse = sum(model.is_sparse(layer) for layer in range(model.layers))
    share = sparse * experts.count * 3 * model.hidden * experts.ffn / model_parameters(model)
    unread = (1 - experts.per_token / experts.count) ** together
    return 1 - share * unread


def _between_ranks(setup: Setup, together: float) -> float:
    """Seconds of a decoding step besides reading and multiplying: kernel launches, and ring sums over the ranks."""
    ranks, assumed = setup.config.rollout.server.tensor_parallel, setup.assumed
    moved = together * setup.model.hidden * setup.element * 2 * (ranks - 1) / ranks
    sums = 2 * (assumed.sum_latency * (ranks > 1) + moved / (setup.gpu.link * assumed.links))
    return setup.model.layers * (assumed.decode_latency + sums)
