"""Bytes on one rank of the actor, phase by phase. Phases do not coexist, so nothing is summed over them.

`tests/unit/plan/test_memory.py` holds this against what a real actor allocates on CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.transport import transport_of
from megatron_rl.plan.activations import FP32, layer_bytes
from megatron_rl.plan.parameters import rank_parameters, stage_layers
from megatron_rl.plan.setup import Setup

Parts = dict[str, float]
"""What takes the memory -> bytes."""

CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048
"""Response tokens that the fused LM head projects at a time: lpreg's default on each device."""
CPU_ROW_BYTES = 4 * 2**20
"""Work space of lpreg's row statistics on CPU; on GPUs they are kernels without any."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Of the ranks of one pipeline stage."""

    stage: int
    phases: dict[str, Parts]
    reserved: Parts = field(default_factory=dict)
    """What a GPU process takes besides, in every phase."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values()) + sum(self.reserved.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.worst)


def actor_memory(setup: Setup) -> list[RankMemory]:
    """One entry a pipeline stage: its ranks differ in nothing that matters here."""
    return [stage_memory(setup, stage) for stage in range(setup.layout.pipeline)]


def stage_memory(setup: Setup, stage: int) -> RankMemory:
    kept = kept_state(setup, stage)
    weights, one_tensor = kept["weights"], _largest_tensor(setup)
    passing = {"a tensor, and its shards": 2 * one_tensor}
    if transport_of(setup.config) == "cuda_ipc":
        kept |= {"what engines map": 2.0 * _half(setup, weights)}
    else:
        passing |= {"a bucket": _bucket(setup, weights)}
    forward = _forward(setup, stage)
    phases: dict[str, Parts] = {
        "load": {name: kept[name] for name in ("weights", "gradients")} | {"a tensor of the folder": one_tensor},
        "rollout": dict(kept),
        "log-probs": kept | forward,
        "forward and backward": kept | _backward(setup, stage),
        "optimizer": kept | _optimizer(setup, stage),
        "weight sync": kept | passing,
        "checkpoint": dict(kept),
    }
    if _other_policy(setup):
        phases["other policy's log-probs"] = kept | {"its weights": weights} | forward
    reserved: Parts = {}
    if setup.config.actor.device != "cpu":
        most = max(sum(parts.values()) for parts in phases.values())
        reserved = {"CUDA, NCCL": setup.assumed.reserve, "fragments": setup.assumed.fragmentation * most}
    return RankMemory(stage, phases, reserved)


def kept_state(setup: Setup, stage: int) -> Parts:
    """What is there all the time: weights, gradient buffers, and the optimizer's state unless it waits on the host."""
    count = rank_parameters(setup.model, setup.layout, stage)
    state: Parts = {"weights": setup.element * count.total, "gradients": FP32 * count.total}
    if not (setup.config.actor.offload_optimizer and setup.config.actor.device != "cpu"):
        state |= optimizer_state(setup, stage)
    return state


def optimizer_state(setup: Setup, stage: int) -> Parts:
    """Main weights (there are none in fp32) and the two moments, shared out over replicas by the distributed one."""
    count, layout = rank_parameters(setup.model, setup.layout, stage), setup.layout
    replicas = expert_replicas = 1
    if setup.config.actor.distributed_optimizer:
        replicas = layout.data * layout.context
        expert_replicas = max(1, layout.tensor * replicas // (layout.expert * layout.expert_tensor))
    part = count.dense / replicas + count.experts / expert_replicas
    main = {"main weights": FP32 * part} if setup.element != FP32 else {}
    return main | {"moments": 2 * FP32 * part}


def host_bytes(setup: Setup, stage: int) -> float:
    """Of the host's memory, for one rank: state that waits there, other policies, a checkpoint being written."""
    weights = setup.element * rank_parameters(setup.model, setup.layout, stage).total
    state = sum(optimizer_state(setup, stage).values())
    algorithm, settings = setup.config.algorithm, setup.config.actor
    total = state if settings.offload_optimizer else 0.0
    total += weights * (algorithm.proxy_source == "lagged") + weights * (algorithm.reference_kl.coefficient > 0)
    return total + (weights + state if setup.config.train.async_save else 0.0)


def _largest_tensor(setup: Setup) -> float:
    """As a Hugging Face folder has it."""
    return setup.element * setup.model.hidden * max(setup.model.vocabulary, setup.model.ffn)


def _bucket(setup: Setup, weights: float) -> float:
    """What is sent in one go: as much as is asked for, but a tensor at least, and a stage's weights at most."""
    return max(_largest_tensor(setup), _half(setup, weights))


def _half(setup: Setup, weights: float) -> float:
    """Of the memory that engines map (weight_sync.transport: cuda_ipc); a larger tensor passes in portions."""
    return min(setup.config.weight_sync.bucket_megabytes * 2**20, setup.layout.tensor * weights)


def _other_policy(setup: Setup) -> bool:
    """Whether another policy's weights take the place of the actor's for a while."""
    algorithm = setup.config.algorithm
    lagged = algorithm.name == "lp_reg" and algorithm.proxy_source == "lagged"
    return lagged or algorithm.reference_kl.coefficient > 0


# ---------------------------------------------------------------------- passes


def _layers(setup: Setup, stage: int) -> list[tuple[float, float, float, float]]:
    """(kept, again, backward, forward) of each layer of a stage, bytes a token."""
    return [
        (layer.kept, layer.again, layer.backward, layer.forward)
        for layer in (
            layer_bytes(
                setup.model,
                setup.layout,
                number,
                b=setup.element,
                recompute=setup.config.actor.recompute,
                transformer_engine=setup.transformer_engine,
            )
            for number in stage_layers(setup.model, setup.layout)[stage]
        )
    ]


def _is_last(setup: Setup, stage: int) -> bool:
    return stage == setup.layout.pipeline - 1


def _forward(setup: Setup, stage: int) -> Parts:
    """Without gradients: one layer at a time, then the head."""
    body = max(forward for *_, forward in _layers(setup, stage)) * setup.micro_batch_tokens
    head = sum(_head(setup, training=False).values()) if _is_last(setup, stage) else 0.0
    return {"activations": body} if body >= head else {"LM head": head}


def _backward(setup: Setup, stage: int) -> Parts:
    """Activations of all micro-batches under way, and the larger of what the head and one layer's backward need."""
    layers, tokens = _layers(setup, stage), setup.micro_batch_tokens
    under_way = min(setup.layout.pipeline - stage, max(1, round(setup.micro_batches)))
    kept = under_way * tokens * sum(kept for kept, *_ in layers)
    again = tokens * max(again for _, again, *_ in layers)
    one_layer = again + tokens * max(backward for *_, backward, _ in layers)
    head = _head(setup, training=True) if _is_last(setup, stage) else {}
    if sum(head.values()) > one_layer:
        return {"activations": kept} | head
    return {"activations": kept, "one layer's backward": one_layer}


def _head(setup: Setup, *, training: bool) -> Parts:
    """The last norm, the hidden states of response tokens and their gradient, and logits: a chunk's, or all."""
    b, hidden, columns = setup.element, setup.model.hidden, setup.vocabulary_part
    tokens, responses = setup.micro_batch_tokens, setup.micro_batch_responses
    on_cpu = setup.config.actor.device == "cpu"
    shared = hidden / (setup.layout.tensor if setup.layout.sequence_parallel else 1)
    norm = tokens * ((2 * FP32 * shared if not setup.transformer_engine else b * shared) + FP32) * training
    states = tokens * b * hidden * (not training) + responses * b * hidden * (1 + training)
    work = CPU_ROW_BYTES if on_cpu else 0.0
    if setup.config.actor.lm_head == "materialised":
        return {"last norm": norm, "hidden states": states, "logits": responses * columns * b + work}
    chunk = min(responses, CPU_CHUNK_TOKENS if on_cpu else GPU_CHUNK_TOKENS)
    logits = chunk * columns * FP32
    if training and b != FP32:
        logits += chunk * columns * (b + FP32 * on_cpu)  # their gradient; CPU multiplies fp32 copies
    if not training and b != FP32 and on_cpu:
        logits += columns * hidden * FP32
    return {"last norm": norm, "hidden states": states, "logits of a chunk": logits + work}


def _optimizer(setup: Setup, stage: int) -> Parts:
    """State that waits on the host comes for the step. On CPU Adam is torch's own, which needs a root and a quotient of
    the largest weight, and gloo gathers the distributed one's weights into a copy."""
    if setup.config.actor.device != "cpu":
        arrives = sum(optimizer_state(setup, stage).values()) if setup.config.actor.offload_optimizer else 0.0
        return {"state, from the host": arrives} if arrives else {}
    layout = setup.layout
    copies = layout.data * layout.context if setup.config.actor.distributed_optimizer else 1
    largest = setup.model.hidden * max(setup.vocabulary_part, 2 * setup.model.ffn / layout.tensor)
    gathered = kept_state(setup, stage)["weights"] if copies > 1 else 0.0
    return {"work space": max(2 * FP32 * largest / copies, gathered)}
