"""The processes of `test_megatron_matches_hf.py`: each rank measures how far Megatron deviates from Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_rl.actor import platform
from megatron_rl.actor.model.policy import build_model
from megatron_rl.actor.optimizer.distributed import wrap_ddp
from megatron_rl.models.fused_experts import as_stored
from megatron_rl.models.weight_map import export_hf_weights, import_values, load_hf_weights, publish_hf_weights
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from tests.hf_models import hf_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so that every frequency band is scaled differently
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-moe": {"model_type": "qwen3_moe"},
    "qwen3-moe-mixed": {
        "model_type": "qwen3_moe",
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-tied-biased": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
}
VOCABULARY = 101  # odd, so tensor parallelism of 2 needs padding
LENGTHS = (7, 12, 3, 9, 5, 16, 8, 4)
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Reference:
    """Results of Hugging Face transformers, one sequence at a time. The loss is the mean over all sequences' tokens."""

    hf_config: dict[str, object]
    weights: dict[str, Tensor]
    sequences: list[Tensor]
    logits: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def reference(case: str) -> Reference:
    shape = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4
    )
    model = hf_model(seed=7, noise=0.1, vocab_size=VOCABULARY, **(shape | CASES[case]))
    sequences = [torch.randint(0, VOCABULARY, (length,)) for length in LENGTHS]
    logits = [model(tokens[None]).logits[0] for tokens in sequences]
    loss = mean_loss(logits, sequences)
    loss.backward()
    parameters = dict(model.named_parameters())
    return Reference(
        hf_config={**model.config.to_dict(), "architectures": [type(model).__name__]},
        weights=as_stored({name: parameter.detach().clone() for name, parameter in parameters.items()}),
        sequences=sequences,
        logits=[x.detach() for x in logits],
        loss=loss.item(),
        gradients=as_stored({name: parameter.grad for name, parameter in parameters.items()}),
    )


def mean_loss(logits: Iterable[Tensor], sequences: Iterable[Tensor]) -> Tensor:
    """Returns these sequences' part of the mean loss over the tokens of all sequences, without each first token."""
    pairs = zip(logits, sequences, strict=True)
    losses = [cross_entropy(x[:-1], tokens[1:], reduction="sum") for x, tokens in pairs]
    return torch.stack(losses).sum() / (sum(LENGTHS) - len(LENGTHS))


class Run:
    """One forward and backward pass of Megatron over this rank's micro-batches of two packed sequences each."""

    def __init__(self, expected: Reference, layout: Layout) -> None:
        self.expected, self.layout = expected, layout
        self.model = build_model(expected.hf_config, layout=layout, dtype=torch.float32, device=DEVICE)
        load_hf_weights(self.model, expected.hf_config, expected.weights)
        self.wrapped = wrap_ddp(self.model)
        self.logits_error = 0.0
        own = range(process_groups.dp_rank(), len(LENGTHS), layout.data)
        self.micro_batches = [own[start : start + 2] for start in range(0, len(own), 2)]

    def losses(self) -> list[float]:
        """Returns the loss of each micro-batch on the last stage. Leaves the gradients in `main_grad`."""
        self.wrapped.zero_grad_buffer()
        metrics = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(self.micro_batches),
            model=[self.wrapped],
            num_microbatches=len(self.micro_batches),
            seq_length=1,  # lengths vary, and stages exchange them
            micro_batch_size=1,
        )
        return [metric["loss"].item() for metric in metrics]

    def _forward(self, micro_batches: Iterator[range], model: torch.nn.Module) -> tuple[Tensor, object]:
        numbers = next(micro_batches)
        sequences = [self.expected.sequences[n] for n in numbers]
        lengths = [len(tokens) for tokens in sequences]
        if padding := -sum(lengths) % self.layout.tensor:  # sequence parallelism splits the tokens evenly
            lengths.append(padding)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
        positions = torch.cat([torch.arange(length) for length in lengths])
        tokens = torch.cat([*sequences, torch.zeros(padding, dtype=torch.int64)])
        output = model(tokens[None], positions[None], None, packed_seq_params=packed)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logits = gather_from_tensor_model_parallel_region(output)[0, :, :VOCABULARY].split(lengths)[: len(numbers)]
            errors = [difference(x, self.expected.logits[n]) for x, n in zip(logits, numbers, strict=True)]
            self.logits_error = max(self.logits_error, *errors)
            total = mean_loss(logits, sequences)
            return total, torch.tensor(sum(lengths), dtype=torch.int), {"loss": total.detach().clone()}

        return output, loss


def measure(case: str, layout: Layout) -> dict[str, object]:
    expected = reference(case)
    run = Run(expected, layout)
    losses = run.losses()
    config, model = expected.hf_config, run.model
    exported = dict(export_hf_weights(model, config))
    main_grads = {name: parameter.main_grad for name, parameter in model.named_parameters()}
    gradients = dict(export_hf_weights(model, config, main_grads))
    imported = dict(import_values(model, config, expected.weights))
    parameters = dict(model.named_parameters())
    return {
        "logits_error": run.logits_error,
        "loss": sum(losses),
        "expected_loss": expected.loss,
        "is_last_stage": process_groups.is_last_stage(),
        "tensor_rank": process_groups.tp_rank(),
        "gradient_errors": {n: relative(g, expected.gradients[n]) for n, g in gradients.items()},
        "exported": sorted(exported),
        **published(model, expected),
        "expected_names": sorted(expected.weights),
        "export_error": max(difference(tensor, expected.weights[name]) for name, tensor in exported.items()),
        "import_error": max(difference(imported[name], parameters[name]) for name in parameters),
        "bf16_export_error": bf16_export_error(expected, layout),
        "grad_norm": clipped_norm(run, model),
        "expected_grad_norm": torch.stack([g.norm() for g in expected.gradients.values()]).norm().item(),
    }


def published(model: torch.nn.Module, expected: Reference) -> dict[str, object]:
    """Returns the names that this rank publishes and their largest error, with and without reuse of memory."""
    kept = dict(publish_hf_weights(model, expected.hf_config))
    transient = publish_hf_weights(model, expected.hf_config, reuse_memory=True)
    errors = [difference(tensor, expected.weights[name]) for name, tensor in transient]
    errors += [difference(tensor, expected.weights[name]) for name, tensor in kept.items()]
    return {"published": sorted(kept), "publish_error": max(errors, default=0.0)}


def bf16_export_error(expected: Reference, layout: Layout) -> float:
    model = build_model(expected.hf_config, layout=layout, dtype=torch.bfloat16, device=DEVICE)
    load_hf_weights(model, expected.hf_config, expected.weights)
    exported = export_hf_weights(model, expected.hf_config)
    return max(difference(tensor, expected.weights[name].bfloat16()) for name, tensor in exported)


def clipped_norm(run: Run, model: torch.nn.Module) -> float:
    """Returns the gradient norm of Megatron's optimizer: over all ranks, with shared parameters counted once."""
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1e-3), [run.wrapped])
    _, norm, _ = optimizer.step()
    return float(norm)


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return (found - expected).abs().max().item()


def relative(found: Tensor, expected: Tensor) -> float:
    return difference(found, expected) / expected.abs().max().item()


def run_rank(rank: int, layout: Layout, meeting: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the measurements of each case on this rank."""
    platform.prepare("cpu")
    store = torch.distributed.FileStore(str(meeting))
    process_groups.init_process_groups(layout, rank=rank, store=store, device=DEVICE)
    measured = {case: measure(case, layout) for case in cases}
    process_groups.destroy()
    return measured
