"""The `cluster` section: the machines of a run, and the batch job that requests them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, PositiveInt, Section, Text, worded

TimeLimit = Annotated[str, worded(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", "[days-]hours:minutes:seconds, such as 24:00:00")]
Option = Annotated[str, worded(r"--[a-z][^\n]*", "an option of sbatch, such as --constraint=h100")]
Image = Annotated[str, worded(r"[^\s,]+", "one path or name, without spaces or commas")]
Mount = Annotated[str, worded(r"/[^\s,:]*(:/[^\s,:]*)?(:ro)?", "/host/path[:/path/inside][:ro]")]


class SlurmSettings(Section):
    """The batch job, used by `megatron-rl slurm` only. Options given to `sbatch` at submission take precedence."""

    time_limit: TimeLimit = "24:00:00"
    """Time limit of the job as [days-]hours:minutes:seconds."""
    signal_minutes: PositiveInt = 60
    """Minutes before the time limit at which the run finishes its step, writes a checkpoint and is queued again."""
    partition: Text | None = None
    """Slurm partition. Default: that of the site."""
    account: Text | None = None
    """Slurm account. Default: that of the user."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How the job asks for cluster.gpus_per_node GPUs: by --gpus-per-node, by --gres=gpu:N, or not at all, for sites
    whose nodes come whole or that want another form in `options`, such as --gres=gpu:h100:8."""
    options: list[Option] = Field(default_factory=list)
    """Further options for `sbatch`, such as --constraint=h100."""
    setup: list[Text] = Field(default_factory=list)
    """Bash lines that run before anything else, such as `source .venv/bin/activate`."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """Container runtime of the processes: none, the pyxis plug-in (enroot), or apptainer."""
    image: Image | None = None
    """Container image: a .sqsh or .sif file, or anything that pyxis can import."""
    mounts: list[Mount] = Field(default_factory=list)
    """Folders to mount, as /host/path[:/path/inside][:ro]. The working folder is always mounted."""
    mount_home: bool = False
    """Whether a container sees the home folder. Without it, caches of compiled kernels go to the node's own disk."""
    port: Annotated[int, Field(ge=1024, le=60000)] = 6379
    """Port of the Ray head. Ray also uses the six ports above it, and its workers use 1000 ports from port + 2000."""


class ClusterSettings(Section):
    """Number and kind of machines. For more than one, RAY_ADDRESS must name a Ray cluster that has them."""

    nodes: PositiveInt = 1
    """Number of machines. A tensor-parallel group or an engine is never split across machines."""
    gpus_per_node: PositiveInt = 8
    """GPUs per machine that the run may use. On CPU, processes are distributed evenly over the machines instead."""
    colocate: bool = False
    """Engines and actor take turns on the same GPUs instead of having separate ones. No effect on placement on CPU."""
    gpu: Literal["h100", "h200", "h20", "a100", "a100_40"] = "h100"
    """GPU model whose memory and rates `megatron-rl plan` assumes (a100 has 80 GB, a100_40 has 40 GB)."""
    restarts: Count = 3
    """How often the run opens again by itself and goes on from its newest checkpoint, if processes of the actor have
    ended, before it has written another checkpoint. 0: the run ends."""
    slurm: SlurmSettings = SlurmSettings()
    """The batch job."""
