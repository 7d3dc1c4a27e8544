"""Rates of GPUs as their makers publish them, and the shares of them that a run is assumed to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in a machine of eight."""

    name: str
    memory: float
    """Bytes that a process can have: what the data sheet says, less what the driver and ECC keep."""
    flops: float
    """Dense bf16 matrix products a second, without sparsity."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other GPUs of the machine, bytes a second each way (NVLink)."""
    network: float
    """To other machines, bytes a second each way; with one adapter for each GPU, as in the maker's own machines."""
    host: float
    """To the host's memory, bytes a second each way (PCIe)."""


# NVIDIA's data sheets: H100 SXM5 (dense bf16 is half of the 1,979 TFLOPS with sparsity), H200 SXM, A100 SXM4 (40 and
# 80 GB); H20 from the figures NVIDIA gives its partners, as the press reports them. Adapters: DGX H100 and H200 have
# eight of 400 Gb/s, DGX A100 eight of 200 Gb/s.
GPUS = {
    "h100": Gpu("H100 SXM 80 GB", 79.1 * GIB, 989e12, 3350 * GB, 450 * GB, 50 * GB, 64 * GB),
    "h200": Gpu("H200 SXM 141 GB", 139.8 * GIB, 989e12, 4800 * GB, 450 * GB, 50 * GB, 64 * GB),
    "h20": Gpu("H20 SXM 96 GB", 95.0 * GIB, 148e12, 4000 * GB, 450 * GB, 50 * GB, 64 * GB),
    "a100": Gpu("A100 SXM 80 GB", 79.1 * GIB, 312e12, 2039 * GB, 300 * GB, 25 * GB, 32 * GB),
    "a100_40": Gpu("A100 SXM 40 GB", 39.4 * GIB, 312e12, 1555 * GB, 300 * GB, 25 * GB, 32 * GB),
}


def known_gpu(device: str) -> Gpu | None:
    """The one that the driver calls so ("NVIDIA H100 80GB HBM3"). None for what is not in the table: other cards of the
    same chip (PCIe, NVL) and parts of one (MIG) have other rates."""
    found = re.match(r"NVIDIA (H100|H200|H20|A100)(?!\d)", device)
    if not found or re.search("PCIe|NVL|MIG", device):
        return None
    return GPUS["a100_40" if found[1] == "A100" and "40GB" in device else found[1].lower()]


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no configuration says. Every time in a plan rests on these; give your own where you have measured them."""

    mean_prompt: float
    """Tokens."""
    mean_response: float
    """Tokens, over the run."""
    spread: float = 0.6
    """Of response lengths: standard deviation of their logarithm."""
    training: float = 0.40
    """Share of the GPU's matrix rate in forward and backward. Megatron-core reports 0.41 to 0.48 on H100 for dense
    models with rows of one length; rows of many lengths cost something."""
    decoding: float = 0.60
    """Share of the memory's rate while decoding."""
    prefill: float = 0.45
    """Share of the matrix rate while reading prompts."""
    links: float = 0.75
    """Share of NVLink's, PCIe's and the network's rates."""
    overlap: float = 0.0
    """Share of the communication that hides behind computation."""
    decode_latency: float = 15e-6
    """Seconds a layer costs in one decoding step whatever the batch."""
    sum_latency: float = 12e-6
    """Seconds that a sum over an engine's ranks costs whatever its size."""
    file_rate: float = 1 * GB
    """Bytes a second that a node writes to the shared file system, or reads from it."""
    reserve: float = 3.5 * GIB
    """Of a GPU, for the CUDA context, NCCL's buffers and cuBLAS workspaces of an actor rank."""
    released: float = 2 * GIB
    """Of a GPU, for what an engine keeps that has released its weights and cache: CUDA context and NCCL's buffers."""
    transformer_engine: bool = True
    """Whether the actor's layers are Transformer Engine's where there are GPUs; they are where it is installed."""
    fragmentation: float = 0.05
    """Of what an actor rank allocates, lost between blocks."""
