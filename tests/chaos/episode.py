"""One run that meets faults until it has taken its steps, and the judgement of what it left."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.manifest import PARTIAL
from tests.chaos import damage
from tests.chaos.faults import FAULTS, Fault, Scene, choose
from tests.chaos.world import World, state
from tests.e2e_cpu.conftest import AGENTS, Descendants
from tests.patience import Patience, Stuck

DISK, SHM = 128 * 2**20, "512m"
FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
PROGRAMS = ("ip", "ss", "iptables", "mkfs.ext4", "fsfreeze", "chattr", "losetup", "unshare")
MOST_STARTS = 12
BETWEEN = "between starts"
CALM_STARTS = 2
"""The last starts of an episode, which meet no faults, so that the run comes to its end."""


@dataclass
class Met:
    """A fault that a run has met."""

    episode: int
    kind: str
    target: str
    phase: str
    """What the run was doing, as its state.json says; `between starts` for damage to files."""
    step: int
    effect: str = ""
    """went on, opened again by itself, ended with a reason, killed, refused; or a finding: traceback, hung."""
    verdict: str = ""
    """Of the whole episode: equal, or how the end differs from the undisturbed run, or what stayed behind."""
    detail: str = ""


class Episode:
    """`number` and seed decide everything that chance decides, except the moments as the machine's load shifts them."""

    def __init__(
        self,
        world: World,
        seed: int,
        number: int,
        most: int,
        only: tuple[str, ...] = (),
        script: Sequence[tuple[str, Fault]] = (),
    ) -> None:
        """most: number of faults. only: the kinds of faults; all by default. script: the first faults, some steps
        apart, which are not drawn."""
        self.world, self.number, self.most, self.only = world, number, most, only
        self.script = list(script)
        self.rng = random.Random(f"{seed}-{number}")
        self.name = f"episodes/{number}/run"
        self.place = world.folder / f"runs/episodes/{number}"
        self.folder = self.place / "run"
        self.log = world.folder / f"runs/episodes/{number}.log"
        self.met: list[Met] = []
        self.root = _may_isolate()
        self.network = f"mrlc-{os.getpid()}-{number}" if self.root else ""
        # Only on request: with libfaketime 0.9.10, Python's own sleep fails with EINVAL.
        self.with_clock = FAKETIME is not None and "clock jump" in only

    def play(self, until: float = math.inf) -> list[Met]:
        """Returns the faults with their outcome. No fault comes after the time `until`."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.log.unlink(missing_ok=True)
        with (
            _loop(self.place, self.root),
            _network(self.network),
            tempfile.TemporaryDirectory(prefix="mrlc-") as temporary,
        ):
            shm = Path(temporary, "shm")
            shm.mkdir()
            with _tmpfs(shm, self.root):
                problems = self._starts(Path(temporary), shm, until)
                self._judge(problems + self._left(Path(temporary), shm))
        if all(met.verdict == "equal" for met in self.met):
            shutil.rmtree(self.place, ignore_errors=True)
            self.log.unlink(missing_ok=True)
        return self.met

    def _starts(self, temporary: Path, shm: Path, until: float) -> list[str]:
        problems: list[str] = []
        for start in range(MOST_STARTS):
            calm = len(self.met) >= self.most or start >= MOST_STARTS - CALM_STARTS or time.monotonic() > until
            if start and not calm:
                self._damage()
            before = len(self.met)
            status = self._start(temporary, shm, calm)
            output = self._output()
            effect = _effect(status, output)
            for met in self.met[before:]:
                met.effect = met.effect or effect
                met.detail = met.detail or _reason(output)
            if effect in ("traceback", "hung"):
                problems.append(f"{effect}: {_reason(output)}")
            if status == 0 and state(self.folder).get("step") == self.world.steps and (self.folder / "hf").is_dir():
                return problems
            if calm and effect != "killed":
                return [*problems, f"did not come to its end: {_reason(output)}"]
        return [*problems, "did not come to its end"]

    def _start(self, temporary: Path, shm: Path, calm: bool) -> int:
        """Starts the run, injects faults, and returns the exit status; -1000 if it hung."""
        self._mark = self.log.stat().st_size if self.log.exists() else 0
        variables, clock = {"TMPDIR": str(temporary)}, None
        if self.with_clock and not calm:
            clock = temporary / "clock"
            clock.write_text("+0\n")
            variables |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
            variables |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        process = self.world.start(
            self.name,
            *self.world.settings,
            "resume=auto",
            shm=shm if self.root else None,
            network=self.network,
            log=self.log,
            **variables,
        )
        descendants = Descendants(process.pid)
        scene = Scene(
            process.pid, self.folder, shm if self.root else None, self.root, clock, self._second, self.network
        )
        status = self._follow(process, scene, calm)
        if status == -1000:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        descendants.join()
        descendants.wait_for_end(of_agents=False)
        self._lingering = descendants
        return status

    def _follow(self, process: subprocess.Popen[bytes], scene: Scene, calm: bool) -> int:
        patience = Patience(lambda: [process.pid], "a run of chaos", window=240.0)
        moments = self._moments()
        while process.poll() is None:
            try:
                patience.check()
            except Stuck as stuck:
                self.met.append(Met(self.number, "none", "", "", -1, "hung", detail=str(stuck)[:2000]))
                return -1000
            self._went_on()
            if not calm and len(self.met) < self.most and next(moments):
                for _ in range(1 if self.script else self.rng.choice((1, 1, 2, 4))):
                    if len(self.met) < self.most and process.poll() is None:
                        self._inject(scene)
                moments = self._moments()
            time.sleep(0.05)
        return process.returncode

    def _went_on(self) -> None:
        """Notes the effect of faults after which the run has done further steps."""
        step = state(self.folder).get("step", 0)
        for met in self.met:
            if not met.effect and met.phase != BETWEEN and step > met.step + 1:
                met.effect = "opened again by itself" if "RESTART" in self._output() else "went on"

    def _moments(self) -> Iterator[bool]:
        """Yields True when the next fault is due: after some seconds, or some steps from now."""
        if not self.script and self.rng.random() < 0.5:
            due = time.monotonic() + self.rng.uniform(0.1, 4.0)
            while True:
                yield time.monotonic() >= due
        step = state(self.folder).get("step", 0)
        wanted, pause = step + self.rng.randint(1, 4), self.rng.uniform(0.0, 0.4)
        while state(self.folder).get("step", 0) < wanted:
            yield False
        due = time.monotonic() + pause
        while True:
            yield time.monotonic() >= due

    def _inject(self, scene: Scene) -> None:
        now, kind = state(self.folder), self.script[0][0] if self.script else choose(self.rng, self.only)
        target = (self.script[0][1] if self.script else FAULTS[kind])(scene, self.rng)
        if target is not None:
            del self.script[:1]
            phase = now.get("phase", "starting") if not now.get("ended") else "starting"
            self.met.append(Met(self.number, kind, target, phase, now.get("step", 0)))

    def _second(self) -> str:
        log = self.place / "second.log"
        log.unlink(missing_ok=True)
        second = self.world.start(self.name, *self.world.settings, "resume=auto", log=log)
        status, text = second.wait(), log.read_text()
        if status == 2 and "another run is in this folder" in text:
            return "refused"
        # The first run may have ended meanwhile, or not have begun to hold its folder.
        return f"status {status}: {_reason(text)}"

    def _damage(self) -> None:
        """Damages files between two starts."""
        for _ in range(self.rng.randrange(3)):
            other = damage.damage_other if self.world.embedded else damage.damage_log  # the ledger needs the dumps
            kind = self.rng.choice((damage.damage_checkpoint, damage.tear_metrics, other))
            kind = kind if self.rng.random() < 0.8 else damage.leave_unfinished
            if done := kind(self.folder, self.rng):
                step = state(self.folder).get("step", 0) if state(self.folder) else 0
                self.met.append(Met(self.number, f"file: {done[0]}", done[1], BETWEEN, step))

    def _output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._mark)
            return file.read().decode(errors="replace")

    def _left(self, temporary: Path, shm: Path) -> list[str]:
        """What stayed behind: processes, shared memory, partial and temporary files."""
        alive = [title for title in self._lingering.alive().values() if not title.startswith(AGENTS)]
        files = [path.name for path in shm.iterdir()] if self.root else []
        files += [str(path.relative_to(self.folder)) for path in self.folder.rglob(f"*{PARTIAL}")]
        files += [p.name for p in temporary.iterdir() if p.name not in ("shm", "clock") and not _of_ray(p)]
        return [f"left behind: {name}" for name in (*alive, *files)]

    def _judge(self, problems: list[str]) -> None:
        ended = (self.folder / "hf/model.safetensors").is_file()
        if ended and (difference := self.world.expected.difference(self.world.result(self.folder))):
            problems.append(f"different: {difference}")
        if not self.met and problems:
            self.met.append(Met(self.number, "none", "", "", -1))
        for met in self.met:
            met.verdict = "; ".join(problems) or "equal"


def _effect(status: int, output: str) -> str:
    if status == -1000:
        return "hung"
    if "Traceback" in output:
        return "traceback"
    if status < 0:
        return "killed"
    if status == 0:
        return "opened again by itself" if "RESTART" in output else "went on"
    return "ended with a reason" if re.search("^error: ", output, re.MULTILINE) else f"ended with status {status}"


def _reason(output: str) -> str:
    found = re.findall(r"^(?:error: .*|RESTART .*|\w*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    return (found[-1] if found else output[-200:])[:500]


def _may_isolate() -> bool:
    """Returns whether this user may give a run a disk, a /dev/shm and a network of its own, and has what that takes."""
    if os.getuid() or not all(shutil.which(program) for program in PROGRAMS):
        return False
    tried = (["losetup", "--find"], ["unshare", "--mount", "--net", "true"])
    return not any(subprocess.run(one, capture_output=True).returncode for one in tried)


def _of_ray(path: Path) -> bool:
    return path.name.startswith(("mrl-ray-", "ray", "torchinductor", "matplotlib", "pymp-"))


@contextlib.contextmanager
def _loop(folder: Path, root: bool) -> Iterator[None]:
    """Mounts a small file system of its own on the folder, if this user may: one that can be full, or stand still."""
    if not root:
        yield
        return
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(DISK)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    try:
        with _mounted(folder, "-o", "loop", str(image)):
            (folder / "lost+found").rmdir()
            yield
    finally:
        image.unlink()


@contextlib.contextmanager
def _tmpfs(folder: Path, root: bool) -> Iterator[None]:
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={SHM}", "tmpfs") if root else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _mounted(folder: Path, *what: str) -> Iterator[None]:
    subprocess.run(["mount", *what, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def _network(name: str) -> Iterator[None]:
    """A network namespace that has a loopback only; none without a name."""
    if not name:
        yield
        return
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def rows(met: list[Met]) -> list[dict[str, Any]]:
    return [asdict(one) for one in met]
