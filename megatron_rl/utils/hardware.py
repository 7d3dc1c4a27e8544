"""Memory and rates of GPUs, as their makers publish them."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB, GIB = 1e9, 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a machine with eight of them."""

    name: str
    memory: float
    """Bytes that processes can use: the figure of the data sheet less what the driver and ECC reserve."""
    flops: float
    """Operations per second in bf16 matrix products, without sparsity."""
    bandwidth: float
    """Bytes per second between the GPU and its memory."""
    link: float
    """Bytes per second in each direction to the other GPUs of the machine (NVLink)."""
    network: float
    """Bytes per second in each direction to other machines, with one adapter per GPU as in the maker's own machines."""
    host: float
    """Bytes per second in each direction to the host's memory (PCIe)."""


# Sources: NVIDIA's data sheets of H100 SXM5 (dense bf16 is half of the 1,979 TFLOPS with sparsity), H200 SXM and A100
# SXM4 (40 and 80 GB); for H20 the figures that NVIDIA gives its partners, as the press reports them. Adapters: DGX H100
# and H200 have eight of 400 Gb/s, DGX A100 has eight of 200 Gb/s.
GPUS = {
    "h100": Gpu("H100 SXM 80 GB", 79.1 * GIB, 989e12, 3350 * GB, 450 * GB, 50 * GB, 64 * GB),
    "h200": Gpu("H200 SXM 141 GB", 139.8 * GIB, 989e12, 4800 * GB, 450 * GB, 50 * GB, 64 * GB),
    "h20": Gpu("H20 SXM 96 GB", 95.0 * GIB, 148e12, 4000 * GB, 450 * GB, 50 * GB, 64 * GB),
    "a100": Gpu("A100 SXM 80 GB", 79.1 * GIB, 312e12, 2039 * GB, 300 * GB, 25 * GB, 32 * GB),
    "a100_40": Gpu("A100 SXM 40 GB", 39.4 * GIB, 312e12, 1555 * GB, 300 * GB, 25 * GB, 32 * GB),
}


def known_gpu(device: str) -> Gpu | None:
    """Returns the GPU with a name that the driver gives ("NVIDIA H100 80GB HBM3"), or None if the table lacks it.

    Other cards with the same chip (PCIe, NVL) and partitions (MIG) have other rates, so they are not in the table.
    """
    found = re.match(r"NVIDIA (H100|H200|H20|A100)(?!\d)", device)
    if not found or re.search("PCIe|NVL|MIG", device):
        return None
    return GPUS["a100_40" if found[1] == "A100" and "40GB" in device else found[1].lower()]
