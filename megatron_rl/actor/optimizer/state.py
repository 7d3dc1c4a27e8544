"""What the optimizer remembers, under parameter names and whole, whichever data-parallel rank keeps which part."""

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
"""weights: those the optimizer steps, fp32 under bf16."""

State = Mapping[str, Mapping[str, Tensor]]
"""Kind -> parameter name -> tensor of the parameter's shape."""


def read_state(optimizer: Optimizer, model: nn.Module) -> tuple[State, int]:
    """The state, in fp32, and the number of steps taken.

    Tensors are made when they are asked for, one at a time. Under the distributed optimizer that is collective over the
    data-parallel ranks: all of them must ask for the same ones in the same order.
    """
    slots = _slots(optimizer, model)
    steps = torch.tensor(max((slot.steps for slot in slots.values()), default=0), device=optimizer.device)
    if optimizer.distributed:  # a rank may hold no part of anything
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=process_groups.dp_group())
    return {kind: _Whole(kind, optimizer, dict(model.named_parameters()), slots) for kind in KINDS}, int(steps)


@torch.no_grad()
def set_state(
    optimizer: Optimizer, model: nn.Module, parts: Iterable[tuple[str, Mapping[str, Tensor]]], steps: int
) -> None:
    """The inverse of `read_state`: parts are a parameter's name and its tensors by kind, and may come from another
    layout. The model's own weights are not touched, unless they are what the optimizer steps."""
    slots = _slots(optimizer, model)
    for name, whole in parts:
        if slot := slots.get(name):
            slot.weight.copy_(slot.part_of(whole["weights"]))
            slot.write_moments({moment: slot.part_of(whole[moment]) for moment in MOMENTS}, steps)
    optimizer.rest()


@dataclass(frozen=True, slots=True)
class _Slot:
    """This rank's part of one parameter, as the optimizer knows it."""

    weight: Tensor
    """What is stepped."""
    span: slice
    """Which elements of the flattened parameter that is."""
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def steps(self) -> int:
        """torch's AdamW counts for each weight; Transformer Engine's and Apex's for a group of them."""
        return int(self.inner.state.get(self.weight, {}).get("step", self.group.get("step", 0)))

    def value(self, kind: str) -> Tensor | None:
        """Flat; None for a moment before the first step."""
        value = self.weight if kind == "weights" else self.inner.state.get(self.weight, {}).get(kind)
        return None if value is None else value.detach().flatten()

    def part_of(self, whole: Tensor) -> Tensor:
        return whole.flatten()[self.span].view_as(self.weight)

    def write_moments(self, moments: dict[str, Tensor], steps: int) -> None:
        state: dict[str, Tensor] = {name: part.to(self.weight, copy=True) for name, part in moments.items()}
        if isinstance(self.inner, torch.optim.AdamW):
            state["step"] = torch.tensor(float(steps))
        else:
            self.group["step"] = steps
        self.inner.state[self.weight] = state


def _slots(optimizer: Optimizer, model: nn.Module) -> dict[str, _Slot]:
    """Parameter name -> this rank's part; without those of which it has none."""
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


class _Whole(Mapping[str, Tensor]):
    """Parameter name -> one kind of its tensors, put together from all ranks' parts."""

    def __init__(
        self, kind: str, optimizer: Optimizer, parameters: dict[str, nn.Parameter], slots: dict[str, _Slot]
    ) -> None:
        self.kind, self.optimizer, self.parameters, self.slots = kind, optimizer, parameters, slots

    def __getitem__(self, name: str) -> Tensor:
        parameter, slot = self.parameters[name], self.slots.get(name)
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        value = slot.value(self.kind) if slot else None
        if slot and value is not None:
            whole[slot.span] = value.to(whole)
        if self.optimizer.distributed:
            # Each element comes from one rank and is 0 elsewhere; a sum of bits, unlike one of floats, keeps a -0.
            dist.all_reduce(whole.view(torch.int32), group=process_groups.replicas_of(parameter))
        return whole.view_as(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)
