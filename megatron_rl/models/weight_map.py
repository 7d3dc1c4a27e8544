"""Loads a Megatron stage's parameters from Hugging Face tensors and exports them as such, under any layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import EMBEDDING, HEAD, Entry, Kind, Shape, rule_of
from megatron_rl.models.fusion import join, split
from megatron_rl.models.weights_check import check_names
from megatron_rl.parallel import process_groups
from megatron_rl.utils.memory import Memory, Reused, fresh

Stage: TypeAlias = GPTModel | nn.ModuleList
"""This rank's part of the model; a list of chunks under the interleaved pipeline schedule."""

Gather: TypeAlias = Callable[[Tensor, dist.ProcessGroup], list[Tensor]]
"""(shard, group) -> the shards of the group's ranks in rank order; empty on a rank that does not need them."""


def load_hf_weights(model: Stage, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]) -> None:
    """Fills this rank's parameters. `hf_tensors` may be lazy: only this stage's tensors are read, one at a time.

    Raises UserError listing every tensor that is missing, unexpected or of the wrong shape.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, shard in _local_shards(model, hf_config, hf_tensors):
            parameters[name].copy_(shard)


def import_values(
    model: Stage, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields this rank's shards of what `export_hf_weights(model, values)` exported, under their Megatron names.

    The shards come one at a time in the order of the model's parameters. The layout may differ from the exporting one.
    Raises UserError as `load_hf_weights` does.
    """
    for name, shard in _local_shards(model, hf_config, hf_tensors):
        yield name, shard.clone()


def export_hf_weights(
    model: Stage, hf_config: Mapping[str, Any], values: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields this pipeline stage's full tensors under their Hugging Face names, one at a time.

    The tensors may be views of the parameters, so use them before the parameters change: for a large model, allocating
    new memory takes longer than copying into it.

    Collective over the ranks that share a layer, including its experts: each of them must exhaust the iterator, and
    receives every tensor. `values`: tensors to export in place of the parameters (a snapshot, optimizer moments), by
    Megatron name and with the parameters' local shapes. Raises ValueError if a shape differs.
    """
    return _full_tensors(model, hf_config, values, process_groups.gather_shards, fresh)


def publish_hf_weights(
    model: Stage, hf_config: Mapping[str, Any], *, reuse_memory: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Like `export_hf_weights`, but only the publishing rank receives tensors.

    The other ranks must exhaust the iterator too; for them it yields nothing. With `reuse_memory` each tensor must be
    used before the next one is requested, which may overwrite it.
    """
    received, joined = (Reused(), Reused()) if reuse_memory else (fresh, fresh)
    tensors = _full_tensors(model, hf_config, None, partial(process_groups.collect_shards, memory=received), joined)
    publishes = process_groups.publishes()
    for pair in tensors:
        if publishes:
            yield pair


@torch.no_grad()
def sends_shards(model: Stage, hf_config: Mapping[str, Any]) -> Iterator[int]:
    """Takes part in `publish_hf_weights` on a rank that does not publish, one transfer at a time.

    Yields how many tensors the publishing rank has received with each transfer.
    """
    parameters = dict(model.named_parameters())
    for exported in _export_plan(model, Architecture.from_hf(hf_config)):
        local = parameters[exported.name].detach()
        for hf_names, _ in _gathered(exported, local, process_groups.collect_shards):
            yield len(hf_names)


@torch.no_grad()
def _full_tensors(
    model: Stage, hf_config: Mapping[str, Any], values: Mapping[str, Tensor] | None, gather: Gather, memory: Memory
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors whose shards this rank receives from `gather`."""
    architecture, parameters = Architecture.from_hf(hf_config), dict(model.named_parameters())
    for exported in _export_plan(model, architecture):
        parameter = parameters[exported.name]
        local = parameter.detach() if values is None else values[exported.name]
        if local.shape != parameter.shape:
            raise ValueError(f"value for {exported.name} has shape {tuple(local.shape)}, not {tuple(parameter.shape)}")
        for hf_names, shards in _gathered(exported, local, gather):
            if shards:
                yield from zip(hf_names, join(exported.kind, shards, architecture, memory), strict=True)


@dataclass(frozen=True, slots=True)
class Exported:
    """How one of this rank's parameters is exported."""

    name: str
    kind: Kind
    of_expert: bool
    hf_names: tuple[tuple[str, ...], ...]
    """Names of the tensors that it becomes part of. An expert's parameter has one tuple for each expert-parallel rank,
    since the corresponding experts of all of them are gathered together."""


_PLANS: WeakKeyDictionary[nn.Module, tuple[Exported, ...]] = WeakKeyDictionary()
"""Plans of the models of this process: a model with experts has thousands of names, and exports after every step."""


def _export_plan(model: Stage, architecture: Architecture) -> tuple[Exported, ...]:
    """Returns how each parameter is exported, in order. The plan is made once per model."""
    if (plan := _PLANS.get(model)) is None:
        entries = [(name, _entry(model, architecture, name)) for name, _ in model.named_parameters()]
        plan = _PLANS[model] = tuple(
            Exported(name, entry.rule.kind, entry.expert is not None, _hf_names(entry, architecture))
            for name, entry in entries
            # The last stage's copy of a tied embedding is left out; the first stage exports it.
            if not (architecture.tied and entry.rule.hf == (HEAD,))
        )
    return plan


def _hf_names(entry: Entry, architecture: Architecture) -> tuple[tuple[str, ...], ...]:
    if entry.expert is None:
        return (entry.hf_names,)
    per_rank = _experts_per_rank(architecture)
    experts = (rank * per_rank + entry.expert % per_rank for rank in range(process_groups.expert_group().size()))
    return tuple(replace(entry, expert=expert).hf_names for expert in experts)


def _gathered(exported: Exported, local: Tensor, gather: Gather) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """Yields the names of a parameter's tensors and its shards over tensor-parallel ranks.

    For an expert's parameter, also yields those of the corresponding experts on the other expert-parallel ranks.
    """
    if not exported.of_expert:
        shards = [local] if exported.kind == "replicated" else gather(local, process_groups.tp_group())
        yield exported.hf_names[0], shards
        return
    tp = process_groups.expert_tp_group().size()
    shards = gather(local, process_groups.expert_shards_group())
    for rank, hf_names in enumerate(exported.hf_names):
        yield hf_names, shards[rank * tp : (rank + 1) * tp]


def _local_shards(
    model: Stage, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    architecture = Architecture.from_hf(hf_config)
    check_names(architecture, hf_tensors)
    problems: list[str] = []
    for name, _ in model.named_parameters():
        entry = _entry(model, architecture, name)
        hf_names = (EMBEDDING,) if architecture.tied and entry.hf_names == (HEAD,) else entry.hf_names
        tensors = {hf_name: hf_tensors[hf_name] for hf_name in hf_names}
        problems += wrong_shapes(entry.hf_shapes(architecture), tensors)
        if not problems:
            group = process_groups.tp_group() if entry.expert is None else process_groups.expert_tp_group()
            yield name, split(entry.rule.kind, list(tensors.values()), architecture, group.size(), group.rank())
    if problems:
        raise UserError("The weights do not fit the model's config.json:\n  " + "\n  ".join(problems))


def kind_of(model: Stage, architecture: Architecture, name: str) -> Kind:
    """Returns how one of this rank's parameters is split over ranks."""
    return _entry(model, architecture, name).rule.kind


def _entry(model: Stage, architecture: Architecture, name: str) -> Entry:
    """Returns the entry of one of this rank's parameters, with its layer and expert counted within the whole model."""
    chunk: GPTModel = model
    if isinstance(model, nn.ModuleList):
        number, _, name = name.partition(".")
        chunk = model[int(number)]
    numbers = [int(number) for number in _NUMBER.findall(name)]
    rule = rule_of(architecture, _NUMBER.sub("*", name))
    if not numbers:
        return Entry(rule)
    layer = chunk.decoder.layers[numbers[0]].layer_number - 1
    if len(numbers) == 1:
        return Entry(rule, layer)
    return Entry(rule, layer, process_groups.expert_group().rank() * _experts_per_rank(architecture) + numbers[1])


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\.weight)\d+$")
"""The number of a layer or an expert in a parameter's name."""


def _experts_per_rank(architecture: Architecture) -> int:
    assert architecture.experts is not None
    return architecture.experts.count // process_groups.expert_group().size()


def wrong_shapes(expected: Iterable[Shape], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns one line for each tensor whose shape is not the expected one."""
    return [
        f"{name}: shape {tuple(tensor.shape)}, expected {shape}"
        for shape, (name, tensor) in zip(expected, tensors.items(), strict=True)
        if tuple(tensor.shape) != shape
    ]
