"""The `cluster` section: the machines of a run."""

from __future__ import annotations

from .fields import PositiveInt, Section


class ClusterSettings(Section):
    """How many machines, and what is in one. With more than one, RAY_ADDRESS names a Ray that has them."""

    nodes: PositiveInt = 1
    """Machines. A tensor-parallel group, or an engine, is never split over two."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a machine that the run may use. On CPU, processes are shared out evenly over the machines instead."""
