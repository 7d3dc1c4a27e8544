"""A real Slurm on one machine: a controller and nodes that Linux namespaces make separate machines.

Each node has its own network address, host name, processes, /dev/shm and /tmp/ray. It can be switched off like a
machine, with all its processes at once. Files are shared, as on a cluster. This requires root and Debian's packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.patience import Patience

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "unshare", "nsenter")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
CPUS = 4
"""CPUs that each node reports; more than the machine has are allowed."""

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost({controller})
SlurmctldPort={port}
SlurmdPort={port_d}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=1
EnforcePartLimits=ALL
KillWait=5
SlurmdTimeout=6
SlurmctldTimeout=10
InactiveLimit=0
Waittime=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """Returns why no cluster can be made here, or None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed; on Debian: apt-get install -y --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "making nodes requires root (network and process namespaces)"
    trial = _run("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true", check=False)
    return f"namespaces cannot be made here: {trial.stderr.strip()}" if trial.returncode else None


_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
REPOSITORY = Path(__file__).parents[2]


def _run(*command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]


@dataclass
class SlurmCluster:
    """A running cluster. Use it as a context manager: `with SlurmCluster(folder) as cluster`."""

    folder: Path
    nodes: tuple[str, ...] = ("node1", "node2", "node3")
    tag: str = field(default_factory=lambda: uuid.uuid4().hex[:6])
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = f"10.{100 + int(self.tag[:2], 16) // 2}.{int(self.tag[2:4], 16)}"

    # ------------------------------------------------------------------ commands of Slurm

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every command and so of every job, with this Python's commands first in PATH."""
        slurm = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        return {**os.environ, "PATH": _PATH, "PYTHONPATH": str(REPOSITORY), **slurm}

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return _run(*command, check=check, env=self.environment, cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """Returns the fields that `scontrol show job` prints."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for(self, what: str, true: Callable[[], bool]) -> None:
        """Wait as long as the jobs of the nodes move. Slurm may let minutes pass before it starts a job again."""
        patience = Patience(lambda: [process.pid for process in self.processes.values()], what, window=600.0)
        while not true():
            patience.check()
            time.sleep(0.3)

    def finish(self, job: str) -> str:
        """Wait for the job's end and return its state, such as COMPLETED."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(f"job {job} ends", lambda: self.job(job)["JobState"] in over)
        return self.job(job)["JobState"]

    # ------------------------------------------------------------------ machines

    def address(self, node: str) -> str:
        return f"{self.network}.{2 + self.nodes.index(node)}"

    def switch_off(self, node: str) -> None:
        """Kill all processes of the node at once and remove its network."""
        process = self.processes.pop(node)
        process.kill()
        process.wait()
        _run("ip", "netns", "delete", self._netns(node), check=False)

    def switch_on(self, node: str) -> None:
        netns, cable = self._netns(node), f"{self.tag}{node}"
        _run("ip", "netns", "add", netns)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", netns)
        _run("ip", "link", "set", cable, "master", self._bridge, "up")
        for command in ("link set lo up", f"address add {self.address(node)}/24 dev eth0", "link set eth0 up"):
            _run("ip", "-n", netns, *command.split())
        hosts = self.folder / "hosts"
        boot = (
            f"hostname {node}; mount --bind {hosts} /etc/hosts; mount -t tmpfs tmpfs /dev/shm; mkdir -p /tmp/ray;"
            f"mount -t tmpfs tmpfs /tmp/ray; exec slurmd -D -N {node}"
        )
        inside = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot]
        self.processes[node] = self._start(node, "nsenter", f"--net=/run/netns/{netns}", *inside)

    def processes_of(self, node: str) -> list[str]:
        """Returns the command lines of the node's processes, except Slurm's daemon."""
        inits = psutil.Process(self.processes[node].pid).children()
        if not inits:
            return []
        space = os.readlink(f"/proc/{inits[0].pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and "slurmd" not in process.name():
                    found.append(" ".join(process.cmdline()))
            except (OSError, psutil.Error):
                continue
        return found

    @property
    def _bridge(self) -> str:
        return f"slurm{self.tag}"

    def _netns(self, node: str) -> str:
        return f"slurm-{self.tag}-{node}"

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    # ------------------------------------------------------------------ from start to end

    def __enter__(self) -> SlurmCluster:
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        lines = [
            f"NodeName={n} NodeHostname={n} NodeAddr={self.address(n)} CPUs={CPUS} State=UNKNOWN" for n in self.nodes
        ]
        conf = SLURM_CONF.format(
            controller=f"{self.network}.1", port=6817, port_d=6818, folder=self.folder, nodes="\n".join(lines)
        )
        (self.folder / "slurm.conf").write_text(conf)
        names = [("127.0.0.1", "localhost"), *((self.address(node), node) for node in self.nodes)]
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names))
        try:
            _run("ip", "link", "add", self._bridge, "type", "bridge")
            _run("ip", "address", "add", f"{self.network}.1/24", "dev", self._bridge)
            _run("ip", "link", "set", self._bridge, "up")
            munge = ("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket")
            files = (f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log")
            self.processes["munged"] = self._start("munged", *munge, *files, f"--seed-file={self.folder}/munged.seed")
            self.wait_for("munge", (self.folder / "munge.socket").exists)
            self.processes["slurmctld"] = self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in self.nodes:
                self.switch_on(node)
            self.wait_for("all nodes", self._all_idle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _all_idle(self) -> bool:
        listed = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).stdout.split("\n")
        return [line for line in listed if line] == [f"{node} idle" for node in self.nodes]

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            if node in self.processes:
                self.switch_off(node)
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait()
        self.processes.clear()
        _run("ip", "link", "delete", self._bridge, check=False)
