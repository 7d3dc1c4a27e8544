"""Memory of one rank of the actor in each phase of a step. Phases follow one another, so they are never summed.

`tests/unit/plan/test_memory_of_actor.py` compares this with the allocations of a real actor on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.passes import passes_of
from megatron_rl.config.transport import transport_of
from megatron_rl.config.weight_sync import BROADCASTS
from megatron_rl.plan.activations import FP32, layer_bytes
from megatron_rl.plan.parameters import model_parameters, rank_parameters, stage_layers, stage_tables
from megatron_rl.plan.setup import Setup

Parts = dict[str, float]
"""Name of a part -> bytes."""

TOKENS_OF_EXPORT_CHECK = 256
"""Tokens whose logits `run/finish.py` compares at the end of a run."""
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048
"""Sampled tokens that the fused LM head projects at a time, by default in lpreg, on CPU and GPU."""
CPU_STATISTICS_BYTES = 4 * 2**20
"""Work space of lpreg's token statistics on the CPU; the GPU kernels need none."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Memory of each rank of one pipeline stage."""

    stage: int
    phases: dict[str, Parts]
    reserved: Parts = field(default_factory=dict)
    """Further memory of a GPU process, in every phase."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values()) + sum(self.reserved.values())

    @property
    def worst(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.worst)


def actor_memory(setup: Setup) -> list[RankMemory]:
    """Returns one entry per pipeline stage; the ranks of a stage have equal needs."""
    return [stage_memory(setup, stage) for stage in range(setup.layout.pipeline)]


def stage_memory(setup: Setup, stage: int) -> RankMemory:
    kept = kept_state(setup, stage)
    weights, one_tensor = kept["weights"], _largest_tensor(setup)
    passing = {"a tensor and its shards": 2 * one_tensor}
    if transport_of(setup.config) == "cuda_ipc":
        kept |= {"memory mapped by engines": 2.0 * _half(setup, weights)}
    else:
        buckets = 2 if transport_of(setup.config) in BROADCASTS else 1  # one on its way, and one being filled
        passing |= {"buckets": buckets * _bucket(setup, weights)}
    forward = _forward(setup, stage)
    phases: dict[str, Parts] = {
        "load": {name: kept[name] for name in ("weights", "gradients")} | {"a tensor of the model folder": one_tensor},
        "rollout": dict(kept),
        "log-probs": kept | forward,
        "forward and backward": kept | _backward(setup, stage),
        "optimizer": kept | _optimizer(setup, stage),
        "weight sync": kept | passing,
        "checkpoint": kept | {"a gathered fp32 tensor": _gathered_tensor(setup)},
        "check of the export": kept | _checked_logits(setup),
    }
    if _other_policy(setup):
        phases["other policy's log-probs"] = kept | {"the other policy's weights": weights} | forward
    reserved: Parts = {}
    if setup.config.actor.device != "cpu":
        most = max(sum(parts.values()) for parts in phases.values())
        reserved = {"CUDA and NCCL": setup.assumed.reserve, "fragmentation": setup.assumed.fragmentation * most}
    return RankMemory(stage, phases, reserved)


def kept_state(setup: Setup, stage: int) -> Parts:
    """Returns the memory held in all phases: weights, gradient buffers, and optimizer state unless it is offloaded.

    Under FP8, Transformer Engine keeps each matrix of the layers twice in one byte per element, by rows and by columns.
    """
    count = rank_parameters(setup.model, setup.layout, stage)
    state: Parts = {"weights": setup.element * count.total, "gradients": FP32 * count.total}
    if setup.config.actor.fp8 != "none":
        state["weights in FP8"] = 2.0 * (count.total - stage_tables(setup.model, setup.layout, stage))
    if not (setup.config.actor.offload_optimizer and setup.config.actor.device != "cpu"):
        state |= optimizer_state(setup, stage)
    return state


def optimizer_state(setup: Setup, stage: int) -> Parts:
    """Returns the bytes of main weights (none if the actor is fp32) and of Adam's two moments.

    A distributed optimizer divides them among the replicas.
    """
    count, layout = rank_parameters(setup.model, setup.layout, stage), setup.layout
    replicas = expert_replicas = 1
    if setup.config.actor.distributed_optimizer:
        replicas = layout.data * layout.context
        expert_replicas = max(1, layout.tensor * replicas // (layout.expert * layout.expert_tensor))
    part = count.dense / replicas + count.experts / expert_replicas
    main = {"main weights": FP32 * part} if setup.element != FP32 else {}
    return main | {"moments": 2 * FP32 * part}


def host_bytes(setup: Setup, stage: int) -> float:
    """Bytes of host memory for one rank: offloaded optimizer state, other policies, a checkpoint being written, and
    the weights that were sent last (weight_sync.transport: delta).

    Copies of weights and state keep their place, and their pinned memory has their size (`utils/host_memory.py`).
    """
    weights = setup.element * rank_parameters(setup.model, setup.layout, stage).total
    state = sum(optimizer_state(setup, stage).values())
    passes, settings = passes_of(setup.config), setup.config.actor
    total = state if settings.offload_optimizer else 0.0
    total += weights * (passes.lagged_proxy + passes.reference)
    if transport_of(setup.config) == "delta":  # the stage's first rank keeps what it sent last
        total += setup.element * model_parameters(setup.model) / setup.layout.pipeline
    return total + (weights + state if setup.config.train.async_save else 0.0)


def shared_memory_bytes(setup: Setup) -> float:
    """Bytes of the copy of all weights that every node with engines has in /dev/shm, which is memory of the node, with
    `weight_sync.transport: shared_memory`; 0 with any other one.

    A file is replaced once its successor is complete, so there is a bucket more.
    """
    if transport_of(setup.config) != "shared_memory":
        return 0.0
    weights = float(setup.element * model_parameters(setup.model))
    return weights + min(weights, setup.config.weight_sync.bucket_megabytes * 2.0**20)


def node_bytes(setup: Setup) -> Parts:
    """Bytes of host memory that a run takes on its fullest node, besides its processes."""
    placement = setup.placement
    nodes = []
    for node in placement.nodes:
        ranks = [rank for rank, place in enumerate(placement.actors) if place == node]
        parts = {"its actor ranks": sum(host_bytes(setup, setup.layout.stage_of(rank)) for rank in ranks)}
        if node in placement.engines:
            parts["weights in /dev/shm"] = shared_memory_bytes(setup)
        nodes.append(parts)
    return max(nodes, key=lambda parts: sum(parts.values()))


def _largest_tensor(setup: Setup) -> float:
    """Bytes of the largest tensor in the Hugging Face folder."""
    return setup.element * setup.model.hidden * max(setup.model.vocabulary, setup.model.ffn)


def _gathered_tensor(setup: Setup) -> float:
    """Peak bytes while the largest tensor is gathered in fp32 for a checkpoint: this rank's part, those of all ranks,
    and these joined. The gate and up matrices of a layer are gathered together and joined one by one."""
    model, t = setup.model, setup.layout.tensor
    if t == 1:
        return float(FP32 * model.hidden * max(model.vocabulary, 2 * model.ffn))
    return FP32 * model.hidden * max(model.vocabulary * (2 + 1 / t), model.ffn * (3 + 2 / t))


def _checked_logits(setup: Setup) -> Parts:
    """Logits of the tokens by which the export is compared: this rank's part, the parts of all ranks, and in fp32."""
    size = TOKENS_OF_EXPORT_CHECK * setup.model.vocabulary * (2 * setup.element + FP32)
    return {"logits of the checked tokens": float(size)}


def _bucket(setup: Setup, weights: float) -> float:
    """Bytes of a bucket: the configured size, but at least one tensor and at most a stage's weights."""
    return max(_largest_tensor(setup), _half(setup, weights))


def _half(setup: Setup, weights: float) -> float:
    """Bytes of each half of the mapped memory (weight_sync.transport: cuda_ipc). Larger tensors pass in portions."""
    return min(setup.config.weight_sync.bucket_megabytes * 2**20, setup.layout.tensor * weights)


def _other_policy(setup: Setup) -> bool:
    """Returns whether another policy's weights temporarily replace the actor's."""
    passes = passes_of(setup.config)
    return passes.lagged_proxy or passes.reference


# ---------------------------------------------------------------------- passes


def _layers(setup: Setup, stage: int) -> list[tuple[float, float, float, float]]:
    """Returns (kept, recomputed, backward, forward) of each layer of a stage, in bytes per token."""
    return [
        (layer.kept, layer.recomputed, layer.backward, layer.forward)
        for layer in (
            layer_bytes(
                setup.model,
                setup.layout,
                number,
                b=setup.element,
                recompute=setup.config.actor.recompute,
                transformer_engine=setup.transformer_engine,
                fused_swiglu=setup.fused_swiglu,
            )
            for number in stage_layers(setup.model, setup.layout)[stage]
        )
    ]


def _is_last(setup: Setup, stage: int) -> bool:
    return stage == setup.layout.pipeline - 1


def _forward(setup: Setup, stage: int) -> Parts:
    """Peak of a forward without gradients: one layer at a time, then the LM head."""
    body = max(forward for *_, forward in _layers(setup, stage)) * setup.micro_batch_tokens
    head = sum(_head(setup, training=False).values()) if _is_last(setup, stage) else 0.0
    return {"activations": body} if body >= head else {"LM head": head}


def _backward(setup: Setup, stage: int) -> Parts:
    """Activations of all micro-batches in flight, and the larger of LM head and one layer's backward."""
    layers, tokens = _layers(setup, stage), setup.micro_batch_tokens
    in_flight = min(setup.layout.pipeline - stage, max(1, round(setup.micro_batches)))
    kept = in_flight * tokens * sum(kept for kept, *_ in layers)
    recomputed = tokens * max(recomputed for _, recomputed, *_ in layers)
    one_layer = recomputed + tokens * max(backward for *_, backward, _ in layers)
    head = _head(setup, training=True) if _is_last(setup, stage) else {}
    if sum(head.values()) > one_layer:
        return {"activations": kept} | head
    return {"activations": kept, "one layer's backward": one_layer}


def _head(setup: Setup, *, training: bool) -> Parts:
    """Bytes of the last norm, of the sampled tokens' hidden states and their gradient, and of the logits.

    The fused LM head holds the logits of one chunk of tokens, the materialised one those of all tokens.
    """
    b, hidden, columns = setup.element, setup.model.hidden, setup.vocabulary_part
    tokens, responses = setup.micro_batch_tokens, setup.micro_batch_responses
    on_cpu = setup.config.actor.device == "cpu"
    shared = hidden / (setup.layout.tensor if setup.layout.sequence_parallel else 1)
    norm = tokens * ((2 * FP32 * shared if not setup.transformer_engine else b * shared) + FP32) * training
    states = tokens * b * hidden * (not training) + responses * b * hidden * (1 + training)
    work = CPU_STATISTICS_BYTES if on_cpu else 0.0
    if setup.config.actor.lm_head == "materialised":
        return {"last norm": norm, "hidden states": states, "logits": responses * columns * b + work}
    chunk = min(responses, CPU_CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS)
    logits = chunk * columns * FP32
    if training and b != FP32:
        logits += chunk * columns * (b + FP32 * on_cpu)  # gradient of the logits; the CPU multiplies fp32 copies
    if not training and b != FP32 and on_cpu:
        logits += columns * hidden * FP32
    return {"last norm": norm, "hidden states": states, "logits of a chunk": logits + work}


def _optimizer(setup: Setup, stage: int) -> Parts:
    """Further memory of the optimizer step.

    On a GPU that is offloaded state, which is copied to the GPU for the step, and without Transformer Engine the roots
    that torch's Adam takes of all second moments at once. On the CPU torch's Adam needs a root and a quotient of the
    largest weight, and gloo gathers a distributed optimizer's weights into a copy.
    """
    if setup.config.actor.device != "cpu":
        state, parts = optimizer_state(setup, stage), dict[str, float]()
        if setup.config.actor.offload_optimizer:
            parts["optimizer state from the host"] = sum(state.values())
        if not setup.assumed.transformer_engine:
            parts["roots of the second moments"] = state["moments"] / 2
        return parts
    layout = setup.layout
    copies = layout.data * layout.context if setup.config.actor.distributed_optimizer else 1
    largest = setup.model.hidden * max(setup.vocabulary_part, 2 * setup.model.ffn / layout.tensor)
    gathered = kept_state(setup, stage)["weights"] if copies > 1 else 0.0
    return {"work space": max(2 * FP32 * largest / copies, gathered)}
