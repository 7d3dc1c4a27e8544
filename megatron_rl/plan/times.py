"""Estimated time of each part of a step, from operations, bytes and assumed rates. Nothing here was measured."""

from __future__ import annotations

from megatron_rl.config.passes import passes_of
from megatron_rl.config.transport import transport_of
from megatron_rl.models.flops import body_flops, head_flops
from megatron_rl.plan.engines import rollout_seconds
from megatron_rl.plan.memory import optimizer_state
from megatron_rl.plan.parameters import model_parameters, rank_parameters
from megatron_rl.plan.setup import Setup

Parts = dict[str, float]


def step_flops(setup: Setup) -> Parts:
    """Operations of the actor's passes over all ranks. All responses count as trained on; dropping some takes less."""
    response_tokens = setup.sequences * setup.lengths.mean()
    body = body_flops(setup.model, setup.step_tokens, setup.step_squares)
    head = head_flops(setup.model, response_tokens)
    shares = {"none": 0.0, "selective": _recomputed_share(setup), "full": 1.0}
    recomputed = shares[setup.config.actor.recompute.granularity]
    epochs = setup.config.train.epochs_per_rollout
    flops = {"forward and backward": epochs * (3 * (body + head) + recomputed * body)}
    if forwards := passes_of(setup.config).forwards:
        flops["log-probs"] = forwards * (body + head)
    return flops


def step_seconds(setup: Setup) -> Parts:
    """Returns part of a step -> seconds. `total_seconds` says which parts follow one another."""
    flops, world = step_flops(setup), setup.layout.world_size
    rate = setup.gpu.flops * (setup.assumed.experts if setup.model.experts else setup.assumed.training)
    bubble = 1 + (setup.layout.pipeline - 1) / setup.micro_batches
    visible = 1 - setup.assumed.overlap
    parts = {"rollout": rollout_seconds(setup)}
    if "log-probs" in flops:
        compute = flops["log-probs"] / world / rate
        parts["log-probs"] = bubble * (
            compute
            + visible
            * passes_of(setup.config).forwards
            * (_tensor_seconds(setup, sums=2) + _expert_seconds(setup, exchanges=2))
        )
    passes = setup.config.train.epochs_per_rollout
    sums = 6 if setup.config.actor.recompute.granularity == "full" else 4
    compute = flops["forward and backward"] / world / rate
    parts["forward and backward"] = bubble * (
        compute + visible * passes * (_tensor_seconds(setup, sums=sums) + _expert_seconds(setup, exchanges=sums))
    )
    parts["gradients over replicas"] = setup.config.train.updates_per_rollout * visible * _replica_seconds(setup)
    parts["optimizer"] = setup.config.train.updates_per_rollout * _optimizer_seconds(setup)
    parts["weight sync"] = _sync_seconds(setup)
    if every := setup.config.train.save_every:
        parts["checkpoint, per step"] = checkpoint_bytes(setup) / _writers(setup) / setup.assumed.file_rate / every
    return parts


def total_seconds(setup: Setup, parts: Parts) -> float:
    """Seconds of a step. The parts follow one another, but asynchronous rollouts run beside the actor's passes."""
    if not setup.config.rollout.asynchronous:
        return sum(parts.values())
    after = sum(parts.get(name, 0.0) for name in ("weight sync", "checkpoint, per step"))
    return max(parts["rollout"], sum(parts.values()) - parts["rollout"] - after) + after


def checkpoint_bytes(setup: Setup) -> float:
    """Bytes of one checkpoint: weights and moments in fp32, and the lagged snapshot."""
    lagged = passes_of(setup.config).lagged_proxy
    return 4 * (3 + lagged) * model_parameters(setup.model)


def _writers(setup: Setup) -> int:
    return len(set(setup.placement.actors))


def _recomputed_share(setup: Setup) -> float:
    """Share of a layer's forward that selective recompute repeats."""
    model = setup.model
    attention = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    mlp = 3 * model.ffn * bool({"mlp", "moe"} & set(setup.config.actor.recompute.modules))
    return mlp / (attention + 3 * model.ffn)


def _tensor_seconds(setup: Setup, *, sums: int) -> float:
    """Seconds of sums over tensor-parallel ranks. sums: number of sums of the hidden states per layer.

    A ring of t ranks moves 2 (t - 1) / t times the data.
    """
    t = setup.layout.tensor
    tokens = setup.step_tokens / setup.layout.data / setup.layout.context
    layers = setup.model.layers / setup.layout.pipeline
    moved = sums * layers * tokens * setup.model.hidden * setup.element * 2 * (t - 1) / t
    return moved / (setup.gpu.link * setup.assumed.links)


def _expert_seconds(setup: Setup, *, exchanges: int) -> float:
    """Seconds of exchanging tokens between the ranks that hold different experts. exchanges: of all routed tokens per
    layer; a forward has two, to the experts and back."""
    experts, layout = setup.model.experts, setup.layout
    if experts is None or layout.expert == 1:
        return 0.0
    shared = layout.tensor if layout.sequence_parallel else 1
    tokens = setup.step_tokens / layout.data / layout.context / shared
    sparse = sum(setup.model.is_sparse(layer) for layer in range(setup.model.layers)) / layout.pipeline
    copied = exchanges * sparse * tokens * experts.per_token * setup.model.hidden * setup.element
    moved = copied * (layout.expert - 1) / layout.expert
    span = layout.expert * layout.expert_tensor > setup.config.cluster.gpus_per_node
    return moved / ((setup.gpu.network if span else setup.gpu.link) * setup.assumed.links)


def _replica_seconds(setup: Setup) -> float:
    """Seconds of exchanging fp32 gradients and weights in a ring of replicas; over the network if they span nodes."""
    replicas = setup.layout.data * setup.layout.context
    if replicas == 1:
        return 0.0
    count = rank_parameters(setup.model, setup.layout, 0).total
    distributed = setup.config.actor.distributed_optimizer
    moved = count * (4 + setup.element if distributed else 8) * (replicas - 1) / replicas
    span = setup.layout.tensor * replicas > setup.config.cluster.gpus_per_node
    return moved / ((setup.gpu.network if span else setup.gpu.link) * setup.assumed.links)


def _optimizer_seconds(setup: Setup) -> float:
    """Seconds of reading and writing the optimizer state once; if offloaded, also of moving it both ways over PCIe."""
    state = sum(optimizer_state(setup, 0).values())
    seconds = 2 * state / (setup.gpu.bandwidth * setup.assumed.decoding)
    if setup.config.actor.offload_optimizer:
        seconds += 2 * state / (setup.gpu.host * setup.assumed.links)
    return seconds


def _sync_seconds(setup: Setup) -> float:
    """Seconds of a weight sync.

    collective: each pipeline stage broadcasts its part to all engines at once. delta counts as much, which its first
    update sends. cuda_ipc: engines read the complete weights from mapped memory. shared_memory: weights go over PCIe to
    the host and back; on several nodes the stages send theirs to every node, one after the other. disk: each stage
    writes its part, then every node reads the complete weights.
    """
    total = setup.element * model_parameters(setup.model)
    part = total / setup.layout.pipeline
    transport = transport_of(setup.config)
    if transport == "disk":
        stage_nodes = set(setup.placement.actors[:: setup.layout.world_size // setup.layout.pipeline])
        return (total / len(stage_nodes) + total) / setup.assumed.file_rate
    if transport == "cuda_ipc":  # stages take turns, and most engines are on other GPUs than a stage's first rank
        return total / (setup.gpu.link * setup.assumed.links)
    apart = len(setup.placement.nodes) > 1
    if transport == "shared_memory":
        sent = total / (setup.gpu.network * setup.assumed.sync) if apart else 0.0
        return ((total if apart else part) + total) / (setup.gpu.host * setup.assumed.links) + sent
    return part / (setup.gpu.network * setup.assumed.sync if apart else setup.gpu.link * setup.assumed.links)
