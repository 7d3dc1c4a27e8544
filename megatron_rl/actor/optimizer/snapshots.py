"""Alternative weights of a model, kept in host memory between uses: the lagged snapshot and the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from megatron_rl.actor.passes.results import Snapshot, Weights
from megatron_rl.utils.host_memory import HostCopies


class Snapshots:
    """Snapshots of one rank's part of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[Snapshot, dict[str, Tensor]] = {}
        self._memory: HostCopies[tuple[Snapshot, str]] = HostCopies()

    def keep(self, name: Snapshot, weights: Mapping[str, Tensor]) -> None:
        """Stores a copy of the weights, given by parameter name, as this snapshot, in the memory of the one before."""
        copies = self._memory.copy({(name, parameter): weight.detach() for parameter, weight in weights.items()})
        self._kept[name] = {parameter: copies[name, parameter] for parameter in weights}

    def get(self, name: Snapshot) -> Mapping[str, Tensor]:
        """Returns a snapshot by parameter name; empty if there is none."""
        return self._kept.get(name, {})

    @contextmanager
    def in_use(self, which: Weights) -> Iterator[None]:
        """Runs the block with the parameters pointing at a snapshot. Raises RuntimeError if the snapshot is missing."""
        if which == "current":
            yield
            return
        if which not in self._kept:
            raise RuntimeError(f"there is no {which} snapshot yet: call snapshot({which!r}) first")
        current = {name: parameter.data for name, parameter in self._model.named_parameters()}
        try:
            for name, parameter in self._model.named_parameters():
                parameter.data = self._kept[which][name].to(parameter.device, non_blocking=True)
            yield
        finally:
            for name, parameter in self._model.named_parameters():
                parameter.data = current[name]
