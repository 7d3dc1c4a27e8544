"""Assumptions of a plan that no configuration states: shares of published rates, and the lengths of responses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

from megatron_rl.utils.hardware import GB, GIB

QUANTILES = 200
"""Number of response lengths that stand for the distribution."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Values that no configuration gives. All times in a plan depend on them; replace those that you have measured."""

    mean_prompt: float
    """Mean prompt length in tokens."""
    mean_response: float
    """Mean response length in tokens, over the run."""
    spread: float = 0.6
    """Standard deviation of the logarithm of response lengths."""
    training: float = 0.40
    """Share of the GPU's matrix rate that the passes of a dense model reach. Megatron-core reports 0.41 to 0.48 on H100
    for sequences of equal length; sequences of different lengths cost some of it."""
    experts: float = 0.15
    """The same share for a model with experts, whose products are small."""
    decoding: float = 0.40
    """Share of the memory bandwidth that decoding reaches, all of an engine's waiting included. This share and the two
    before it are those that explain published steps of NeMo-RL best (`benchmarks/plan.py`)."""
    prefill: float = 0.45
    """Share of the matrix rate that prefill reaches."""
    links: float = 0.75
    """Share of the rates of NVLink, PCIe and network that communication reaches."""
    sync: float = 0.18
    """Share of the rate of one network adapter that a weight sync over the network reaches, collecting and loading
    included. Published figures of verl lie between 0.09 and 0.36 (`benchmarks/plan.py`)."""
    overlap: float = 0.0
    """Share of the communication that overlaps with computation."""
    decode_latency: float = 15e-6
    """Seconds per layer and decoding step, independent of the batch size."""
    sum_latency: float = 12e-6
    """Seconds per sum over an engine's ranks, independent of its size."""
    file_rate: float = 1 * GB
    """Bytes per second that a node writes to or reads from the shared file system."""
    reserve: float = 3.5 * GIB
    """Bytes of a GPU for the CUDA context, NCCL buffers and cuBLAS workspaces of an actor rank."""
    released: float = 2 * GIB
    """Bytes of a GPU that a sleeping engine keeps after releasing weights and cache: CUDA context and NCCL buffers."""
    transformer_engine: bool = True
    """Whether the actor uses Transformer Engine layers on GPUs, as it does if the package is installed."""
    fragmentation: float = 0.05
    """Share of an actor rank's allocations that is lost to fragmentation."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of response lengths: equally likely lengths in ascending order."""

    values: tuple[float, ...]

    def mean(self, of: Callable[[float], float] = lambda length: length) -> float:
        """Returns the mean of a function of the length; by default that of the length itself."""
        return sum(of(length) for length in self.values) / len(self.values)

    def longer(self, than: float) -> float:
        """Returns the share of responses that are longer than `than`."""
        return sum(length > than for length in self.values) / len(self.values)

    @property
    def truncated(self) -> float:
        """Share of responses that reach the length limit."""
        return sum(length >= self.values[-1] for length in self.values) / len(self.values)


@cache
def lengths(mean: float, spread: float, limit: float) -> Lengths:
    """Returns log-normal lengths truncated at the limit. mean: after truncation; must be below the limit."""
    normal = [NormalDist().inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]
    low, high = math.log(mean) - 3 * spread, math.log(limit) + 3 * spread
    for _ in range(60):  # bisection: the mean rises with the median
        middle = (low + high) / 2
        values = tuple(min(limit, math.exp(middle + spread * z)) for z in normal)
        low, high = (middle, high) if sum(values) / QUANTILES < mean else (low, middle)
    return Lengths(values)
