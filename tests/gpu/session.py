"""Runs everything that only a GPU can judge, the most telling first, within twelve minutes on one GPU.

    python -m tests.gpu.kit --transformer-engine ARCHIVE    where there is a network: collects what the machine lacks
    python -m tests.gpu.session --out FOLDER                on the GPU machine, in the root of the repository
    make rehearse-session                                   on a CPU, over the rehearsal's stand-ins (--dry)

The session writes FOLDER/session.json after every step, so that a session that is cut off leaves what it has found;
FOLDER/session.md, the same as a section of a page; and FOLDER/log.txt, the output of all steps. Its exit status is 0
if every step that ran has passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.answers import Answer, read, write
from tests.gpu.kit import KIT, REPOSITORY
from tests.gpu.steps import STEPS, Step

MINUTES = 12
"""Time that the whole session may take."""
LEAST_SECONDS = 15
"""A step does not start with less time than this."""
SLOWER = 20
"""Factor of all limits in a dry session."""
NO_TESTS = 5
"""Exit status of pytest if no test is selected."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for session.json, session.md and log.txt")
    parser.add_argument("--dry", action="store_true", help="run on a CPU, over the rehearsal's stand-ins")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = rehearsed() if settings.dry else unpacked(Path(folder))
        answers = run(settings.out, paths, settings.minutes * 60 * (SLOWER if settings.dry else 1), settings.dry)
    sys.exit(any(answer.outcome in ("failed", "ran out of time") for answer in answers))


@dataclass(frozen=True)
class Paths:
    """How Python finds what a step imports."""

    python: str
    plain: dict[str, str]
    """Environment of a step without Transformer Engine."""
    engine: dict[str, str] | None
    """Environment of a step with Transformer Engine; None if there is none."""


def unpacked(folder: Path) -> Paths:
    """Unpacks the kit into the folder. What the kit lacks, the machine's own packages provide."""
    site = folder / "site"
    if wheels := sorted((KIT / "wheels").glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(site), *map(str, wheels)], check=True)
    plain = {"PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])}
    archives = sorted(KIT.glob("transformer_engine*"))
    if not archives:
        installed = importlib.util.find_spec("transformer_engine") is not None
        return Paths(sys.executable, plain, plain if installed else None)
    engine = folder / "engine"
    with tarfile.open(archives[0]) as archive:
        archive.extractall(engine, filter="data")
    return Paths(sys.executable, plain, {"PYTHONPATH": os.pathsep.join([str(site), str(engine), str(REPOSITORY)])})


def run(out: Path, paths: Paths, budget: float, dry: bool) -> list[Answer]:
    """Runs the steps in their order, and writes what is known after each of them."""
    start, answers = time.monotonic(), []
    described = describe(paths, dry)
    runs_engine = True
    for number, step in enumerate(STEPS, 1):
        left = budget - (time.monotonic() - start)
        if step.transformer_engine and (paths.engine is None or not runs_engine):
            answer = left_out(step, "there is no Transformer Engine that runs")
        elif left < LEAST_SECONDS:
            answer = left_out(step, "no time was left")
        else:
            print(f"[{number}/{len(STEPS)}] {step.name}: {step.question}", flush=True)
            answer = take(step, paths, min(left, step.seconds * (SLOWER if dry else 1)), out / "log.txt", dry)
        if step is STEPS[0]:
            runs_engine = answer.outcome == "passed"
        print(f"    {answer.outcome}, {answer.seconds:.0f} s {answer.reason}", flush=True)
        answers.append(answer)
        write(out, described, answers, time.monotonic() - start)
    return answers


def left_out(step: Step, reason: str) -> Answer:
    return Answer(step.name, step.question, "left out", reason=reason)


def take(step: Step, paths: Paths, seconds: float, log: Path, dry: bool) -> Answer:
    """Runs one step. What it prints is added to the log."""
    environment = paths.engine if step.transformer_engine else paths.plain
    assert environment is not None
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".xml") as report, log.open("a") as output:
        output.write(f"\n===== {step.name}: {' '.join(step.tests)}\n")
        output.flush()
        # Memory, speed and the driver cannot be rehearsed.
        selection = ["-m", "gpu and not measured"] if dry else []
        command = [paths.python, "-m", "pytest", "-q", "-rs", "-s", "-p", "no:cacheprovider", "--color=no"]
        command += ["-o", "junit_family=legacy"]  # the family that keeps what tests record
        process = subprocess.Popen(
            [*command, f"--junitxml={report.name}", *selection, *step.tests],
            cwd=REPOSITORY, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return Answer(step.name, step.question, "ran out of time", time.monotonic() - start, reason="see log.txt")
        cases = read(Path(report.name))
    answer = Answer(step.name, step.question, "passed", time.monotonic() - start, cases)
    if dry and status == NO_TESTS:
        answer.outcome = "judged only by a GPU"
    elif status != 0 or not any(case.outcome == "passed" for case in cases):
        answer.outcome = "failed" if status != 0 else "left out"
        answer.reason = next((case.message for case in cases if case.outcome != "passed"), "see log.txt")
    return answer


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the step's processes, which are a process group of their own."""
    os.killpg(process.pid, 15)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()


def describe(paths: Paths, dry: bool) -> dict[str, Any]:
    """Returns the machine and its versions, as a step sees them."""
    script = (
        "import importlib.metadata as m, json, torch\n"
        "names = ('megatron-core', 'transformer-engine', 'transformer-engine-torch', 'triton', 'transformers')\n"
        "have = {n: m.version(n) for n in names if any(True for _ in m.distributions(name=n))}\n"
        "cuda = torch.cuda.is_available()\n"
        "print(json.dumps({'gpu': torch.cuda.get_device_name() if cuda else None, 'cuda': torch.version.cuda,"
        " 'torch': torch.__version__, **have}))\n"
    )
    environment = os.environ | (paths.engine or paths.plain)
    done = subprocess.run([paths.python, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"torch does not start here:\n{done.stderr[-2000:]}")
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if machine["gpu"] is None:
        sys.exit("torch sees no GPU here. Run the session on a machine with one, or with --dry on a CPU")
    if not dry:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        machine["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return machine | {"python": platform.python_version(), "cores": os.cpu_count(), "rehearsed": dry}


def rehearsed() -> Paths:
    """Returns the paths of the rehearsal, in which CUDA is the CPU. Run the session with its Python."""
    from tests.rehearsal.__main__ import environment
    from tests.rehearsal.versions import NEWEST

    engine, megatron = NEWEST
    return Paths(sys.executable, environment(None, megatron), environment(engine, megatron))


if __name__ == "__main__":
    main()
