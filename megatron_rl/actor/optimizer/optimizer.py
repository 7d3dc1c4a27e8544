"""AdamW through Megatron: building it, stepping it, and keeping its state between steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_rl.utils.host_memory import HostCopies

if TYPE_CHECKING:
    from megatron_rl.config.actor import OptimizerSettings


Place = tuple[Tensor, str | None]
"""A tensor of the state: a weight that is stepped and the name of its moment, or None for the weight itself."""


class Optimizer:
    """AdamW over DDP-wrapped chunks of a model, with fp32 main weights under bf16.

    The state is split over the data-parallel ranks if the chunks were wrapped for the distributed optimizer. With
    `offload` the moments, and under bf16 the main weights, stay in host memory except during `step`. The arithmetic is
    the same.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        settings: OptimizerSettings,
        dtype: torch.dtype,
        *,
        offload: bool = False,
    ) -> None:
        self.device = next(chunks[0].parameters()).device
        self.distributed: bool = chunks[0].ddp_config.use_distributed_optimizer
        self._state_device = torch.device("cpu") if offload else self.device
        self._has_main_weights = dtype != torch.float32
        self._memory: HostCopies[Place] = HostCopies()
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad or math.inf,  # with 0 Megatron would not compute the gradient norm
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=self.distributed,
        )
        self.megatron = get_megatron_optimizer(config, list(chunks))
        self.rest()

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers: one for the dense weights and one for the experts."""
        parts: list[Any] = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in parts if part.optimizer is not None]

    def step(self, lr: float) -> float:
        """Takes a step on the gradients in `main_grad`. Returns their global norm before clipping."""
        for group in self.megatron.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        self._move(self.device)
        _, grad_norm, _ = self.megatron.step()
        self.rest()
        return float(grad_norm)

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def rest(self) -> None:
        """Moves the state to the device where it stays between steps."""
        self._move(self._state_device)

    def _move(self, device: torch.device) -> None:
        """Moves the state to a device, unless it is there already. Host memory is used again at every step."""
        places = {key: tensor for key, tensor in self._tensors().items() if tensor.device.type != device.type}
        if not places:
            return
        if device.type == "cpu":
            moved = self._memory.copy(places)
        else:
            moved = {key: tensor.to(device, non_blocking=True) for key, tensor in places.items()}
        states = {weight: state for part in self.parts for weight, state in part.optimizer.state.items()}
        for (weight, name), tensor in moved.items():
            if name is None:
                weight.data = tensor
            else:
                states[weight][name] = tensor

    def _tensors(self) -> dict[Place, Tensor]:
        """Returns the tensors of the state."""
        moments: dict[Place, Tensor] = {
            (weight, name): value
            for part in self.parts
            for weight, state in part.optimizer.state.items()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.ndim  # Adam decides where the step count stays
        }
        return moments | {(weight, None): weight.data for weight in self._main_weights()}

    def _main_weights(self) -> Iterator[Tensor]:
        """Yields the fp32 copies of the model's weights. An fp32 model has none: its own weights are stepped."""
        for part in self.parts if self._has_main_weights else ():
            for group in part.optimizer.param_groups:
                yield from group["params"]
