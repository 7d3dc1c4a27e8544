"""The `cluster` section: the machines of a run, and the batch job that asks for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import PositiveInt, Section, Text, worded

TimeLimit = Annotated[str, worded(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", "[days-]hours:minutes:seconds, such as 24:00:00")]
Option = Annotated[str, worded(r"--[a-z][^\n]*", "an option of sbatch, such as --constraint=h100")]
Image = Annotated[str, worded(r"[^\s,]+", "one path or name, without spaces or commas")]
Mount = Annotated[str, worded(r"/[^\s,:]*(:/[^\s,:]*)?(:ro)?", "/host/path[:/path/inside][:ro]")]


class SlurmSettings(Section):
    """What `megatron-rl slurm` writes; read by nothing else. Options of `sbatch` at submission win over these."""

    time_limit: TimeLimit = "24:00:00"
    """Of the job, as [days-]hours:minutes:seconds."""
    signal_minutes: PositiveInt = 60
    """Minutes before the limit at which the run finishes its step, writes a checkpoint, and is queued again."""
    partition: Text | None = None
    """Unset: the site's default."""
    account: Text | None = None
    """Unset: the user's default."""
    options: list[Option] = Field(default_factory=list)
    """More options for `sbatch`, such as --constraint=h100."""
    setup: list[Text] = Field(default_factory=list)
    """Lines of bash before anything starts, such as `source .venv/bin/activate`."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """How processes get into the image: not at all, by the pyxis plug-in (enroot), or by apptainer."""
    image: Image | None = None
    """Of the container: a .sqsh or .sif file, or what pyxis can import."""
    mounts: list[Mount] = Field(default_factory=list)
    """/host/path[:/path/inside][:ro]. The working folder is always mounted."""
    port: Annotated[int, Field(ge=1024, le=60000)] = 6379
    """Of Ray's head. Ray uses this and the six ports above it, and its workers the 1000 from port + 2000 on."""


class ClusterSettings(Section):
    """How many machines, and what is in one. With more than one, RAY_ADDRESS names a Ray that has them."""

    nodes: PositiveInt = 1
    """Machines. A tensor-parallel group, or an engine, is never split over two."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a machine that the run may use. On CPU, processes are shared out evenly over the machines instead."""
    colocate: bool = False
    """Engines use the actor's GPUs in turns with it, instead of GPUs of their own. On CPU nothing goes elsewhere."""
    gpu: Literal["h100", "h200", "h20", "a100", "a100_40"] = "h100"
    """Kind of GPU (a100 has 80 GB, a100_40 40), whose memory and rates `megatron-rl plan` counts with."""
    slurm: SlurmSettings = SlurmSettings()
    """The batch job."""
