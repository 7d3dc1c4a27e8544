"""Adam through Megatron, and its moments under parameter names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron_rl.config.actor import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> Any:
    """AdamW over a DDP-wrapped model, with fp32 main weights under bf16. The learning rate is set at each step."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad or math.inf,  # 0 would leave the gradient norm uncomputed
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=False,
    )
    return get_megatron_optimizer(config, [model])


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def _states(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return {param: state for part in parts for param, state in part.optimizer.state.items()}


def main_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> the weights the optimizer steps: fp32 copies under bf16, else the parameters themselves."""
    return {name: getattr(param, "main_param", param) for name, param in model.named_parameters()}


def read_moments(optimizer: Any, model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Moment name -> parameter name -> tensor of the parameter's shape, and the number of steps taken."""
    states = _states(optimizer)
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
    steps = 0
    for name, weight in main_weights(model).items():
        state = states.get(weight, {})
        steps = max(steps, int(state.get("step", 0)))
        for moment in MOMENTS:
            moments[moment][name] = state.get(moment, torch.zeros_like(weight))
    return moments, steps


@torch.no_grad()
def write_moments(optimizer: Any, model: nn.Module, moments: dict[str, dict[str, Tensor]], steps: int) -> None:
    """The inverse of `read_moments`, into a fresh optimizer."""
    weights = main_weights(model)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        stepped = {param for group in part.optimizer.param_groups for param in group["params"]}
        for name, weight in weights.items():
            if weight in stepped:
                state = {moment: moments[moment][name].to(weight).clone() for moment in MOMENTS}
                part.optimizer.state[weight] = {"step": torch.tensor(float(steps)), **state}
