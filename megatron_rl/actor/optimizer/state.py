"""The optimizer's state as full tensors by parameter name, whichever data-parallel ranks hold the parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rl.actor.optimizer.optimizer import Optimizer
from megatron_rl.parallel import process_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weights", *MOMENTS)
"""`weights` are those that the optimizer steps: fp32 copies under bf16."""

State = Mapping[str, Mapping[str, Tensor]]
"""Kind -> parameter name -> tensor of the parameter's shape."""


def read_state(optimizer: Optimizer, model: nn.Module) -> tuple[State, int]:
    """Returns the state in fp32 and the number of steps taken.

    Each tensor is assembled on access. With the distributed optimizer an access is collective over the data-parallel
    ranks: all of them must access the same tensors in the same order.
    """
    slots = _slots(optimizer, model)
    steps = torch.tensor(max((slot.steps for slot in slots.values()), default=0), device=optimizer.device)
    if optimizer.distributed:  # a rank may hold no state at all
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=process_groups.dp_group())
    return {kind: _FullTensors(kind, optimizer, dict(model.named_parameters()), slots) for kind in KINDS}, int(steps)


@torch.no_grad()
def set_state(
    optimizer: Optimizer, model: nn.Module, parts: Iterable[tuple[str, Mapping[str, Tensor]]], steps: int
) -> None:
    """Restores what `read_state` returned, also from another layout.

    parts: pairs of a parameter's name and its full tensors by kind. The model's own weights change only if they are the
    weights that the optimizer steps.
    """
    slots = _slots(optimizer, model)
    for name, full in parts:
        if slot := slots.get(name):
            slot.weight.copy_(slot.part_of(full["weights"]))
            slot.write_moments({moment: slot.part_of(full[moment]) for moment in MOMENTS}, steps)
    optimizer.rest()


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """This rank's part of one parameter in the optimizer."""

    weight: Tensor
    """The tensor that the optimizer steps."""
    span: slice
    """Position of `weight` in the flattened parameter."""
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps taken. torch's AdamW counts them per weight, Transformer Engine's and Apex's per parameter group."""
        return int(self.inner.state.get(self.weight, {}).get("step", self.group.get("step", 0)))

    def value(self, kind: str) -> Tensor | None:
        """Returns the flattened tensor of a kind; None for a moment before the first step."""
        value = self.weight if kind == "weights" else self.inner.state.get(self.weight, {}).get(kind)
        return None if value is None else value.detach().flatten()

    def part_of(self, full: Tensor) -> Tensor:
        return full.flatten()[self.span].view_as(self.weight)

    def write_moments(self, moments: dict[str, Tensor], steps: int) -> None:
        state: dict[str, Tensor] = {name: part.to(self.weight, copy=True) for name, part in moments.items()}
        if isinstance(self.inner, torch.optim.AdamW):
            state["step"] = torch.tensor(float(steps))
        else:
            self.group["step"] = steps
        self.inner.state[self.weight] = state


def _slots(optimizer: Optimizer, model: nn.Module) -> dict[str, _Slot]:
    """Returns this rank's part of each parameter by name, without the parameters of which the rank holds nothing."""
    slots: dict[str, _Slot] = {}
    for part in optimizer.parts:
        groups = part.optimizer.param_groups
        places = {weight: group for group in groups for weight in group["params"]}
        for name, parameter in model.named_parameters():
            if not optimizer.distributed:
                weight, span = getattr(parameter, "main_param", parameter), slice(0, parameter.numel())
            elif parameter in part.model_param_group_index_map:
                group, place = part.model_param_group_index_map[parameter]
                held = part._get_model_param_range_map(parameter)["param"]
                weight, span = groups[group]["params"][place], slice(held.start, held.end)
            else:
                continue
            if weight in places:
                slots[name] = _Slot(weight, span, part.optimizer, places[weight])
    return slots


class _FullTensors(Mapping[str, Tensor]):
    """The tensors of one kind by parameter name, each assembled from the parts of all ranks."""

    def __init__(
        self, kind: str, optimizer: Optimizer, parameters: dict[str, nn.Parameter], slots: dict[str, _Slot]
    ) -> None:
        self.kind, self.optimizer, self.parameters, self.slots = kind, optimizer, parameters, slots

    def __getitem__(self, name: str) -> Tensor:
        parameter, slot = self.parameters[name], self.slots.get(name)
        full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        value = slot.value(self.kind) if slot else None
        if slot and value is not None:
            full[slot.span] = value.to(full)
        if self.optimizer.distributed:
            # Each element is non-zero on one rank only. Summing the bits as integers, unlike summing floats, keeps -0.
            dist.all_reduce(full.view(torch.int32), group=process_groups.replicas_of(parameter))
        return full.view_as(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)
