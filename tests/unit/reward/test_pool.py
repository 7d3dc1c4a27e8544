"""The pool: a bad sample costs only itself, and no process stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.reward import RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardPool, outcome_rates
from megatron_rl.reward.results import ACCEPTED
from megatron_rl.types import Outcome, RewardResult, Sample
from tests.patience import command_of
from tests.tiers import slow

MISBEHAVING = """
import ctypes, os, sys, time
from megatron_rl.types import RewardResult

LEAKED = []

HEAVY = ("torch", "ray", "megatron", "transformers", "math_verify", "pyarrow")

def score(sample):
    match sample.text:
        case "sleep":
            time.sleep(3600)
        case "stuck in C":
            9**9**9**9
        case "exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "huge":
            bytearray(10**11)
        case "leak":
            LEAKED.append(bytearray(64 * 2**20))
        case "raise":
            raise KeyError("lost")
        case "sys.exit":
            sys.exit("bye")
        case "print":
            print("a verifier speaks")
        case "slow":
            time.sleep(0.3)
        case "signal":
            open(sample.prompt.label, "w").close()
            time.sleep(3600)
        case "nan":
            return RewardResult(float("nan"))
        case "text":
            return "1.0"
        case "imports":
            return RewardResult(1.0, ",".join(name for name in HEAVY if name in sys.modules))
        case "interrupt":
            os.kill(os.getpid(), 2)
    return RewardResult(1.0, sample.text)
"""

PATIENT_SECONDS = 600.0
"""Time limit that no sample reaches, however busy the machine is."""
ENDLESS = ("sleep", "stuck in C")

MakeSample = Callable[..., Sample]


def make_pool(name: str, *, workers: int, timeout_seconds: float, **more: Any) -> RewardPool:
    log_file, decode = more.pop("log_file", None), more.pop("decode", None)
    settings = RewardSettings(name=name, workers=workers, timeout_seconds=timeout_seconds, **more)
    return RewardPool(settings, log_file, decode)


def passed(text: str, answer: str | None = None) -> RewardResult:
    """The result of a sample with this text; `answer`: by default the text."""
    return RewardResult(1.0, text if answer is None else answer, text=text)


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def pool(verifiers: Path) -> Iterator[RewardPool]:
    """A pool for samples that all end by themselves."""
    with make_pool("misbehaving:score", workers=2, timeout_seconds=PATIENT_SECONDS) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient_pool(verifiers: Path) -> Iterator[RewardPool]:
    """A pool for samples that never end, beside good ones."""
    with make_pool("misbehaving:score", workers=2, timeout_seconds=3.0) as pool:
        yield pool


def workers() -> list[psutil.Process]:
    """The workers of all pools. Python's own resource tracker stays as long as the process that uses it."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(command_of(child))]


def wait_for_end(processes: list[psutil.Process]) -> None:
    while psutil.wait_procs(processes, timeout=1.0)[1]:
        pass


def test_results_keep_the_order(pool: RewardPool, make_sample: MakeSample) -> None:
    for count in (0, 1, 2, 9, 128):
        texts = [str(i) for i in range(count)]
        assert pool.score([make_sample(text) for text in texts]) == [passed(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("sleep", "timeout", "took too long"),
        ("stuck in C", "timeout", "took too long"),
        ("exit", "error", "the verifier's process died with exit code 3"),
        ("segfault", "error", "the verifier's process died with exit code -11"),
        ("huge", "error", "out of memory"),
        ("raise", "error", "KeyError: 'lost' (misbehaving.py, line 24)"),
        ("sys.exit", "error", "SystemExit: bye (misbehaving.py, line 26)"),
        ("nan", "error", "ValueError: the score is nan"),
        ("text", "error", f"TypeError: the score is str '1.0', not a number; {ACCEPTED}"),
    ],
)
def test_a_misbehaving_sample_costs_only_itself(
    pool: RewardPool, impatient_pool: RewardPool, make_sample: MakeSample, text: str, outcome: Outcome, detail: str
) -> None:
    samples = [make_sample("good") for _ in range(20)]
    samples[7] = make_sample(text)
    results = (impatient_pool if text in ENDLESS else pool).score(samples)
    assert results.pop(7) == RewardResult(0.0, None, detail, outcome, text)
    assert results == [passed("good")] * 19


def test_several_samples_misbehave_at_once(impatient_pool: RewardPool, make_sample: MakeSample) -> None:
    results = impatient_pool.score([make_sample(text) for text in ["sleep", "exit", "good"] * 2])
    assert [result.score for result in results] == [0, 0, 1] * 2
    rates = outcome_rates(results)
    assert rates == {"reward/timeout_fraction": 2 / 6, "reward/error_fraction": 2 / 6}


@slow
def test_slow_samples_do_not_add_up_to_a_timeout(
    verifiers: Path, make_sample: MakeSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of 24 takes longer than a chunk may, no sample does: nothing is killed."""
    monkeypatch.setattr("megatron_rl.reward.pool.CHUNKS_PER_WORKER", 1)
    before = workers()
    with make_pool("misbehaving:score", workers=1, timeout_seconds=5) as pool:
        pool.score([make_sample("good")])
        ours = [worker for worker in workers() if worker not in before]
        assert pool.score([make_sample("slow")] * 24) == [passed("slow")] * 24
        assert [worker for worker in workers() if worker not in before] == ours


def test_workers_import_only_what_they_need(pool: RewardPool, make_sample: MakeSample) -> None:
    assert pool.score([make_sample("imports")]) == [passed("imports", "")]


def test_workers_ignore_ctrl_c(pool: RewardPool, make_sample: MakeSample) -> None:
    assert pool.score([make_sample("interrupt")]) == [passed("interrupt")]


@slow
def test_a_leaking_worker_is_replaced_without_cost_to_a_sample(verifiers: Path, make_sample: MakeSample) -> None:
    """Forty times 64 MB under a limit of 512 MB: workers are replaced in time."""
    before = workers()
    with make_pool("misbehaving:score", workers=1, timeout_seconds=PATIENT_SECONDS, memory_mb=512) as pool:
        pool.score([make_sample("good")])
        ours = [worker for worker in workers() if worker not in before]
        assert pool.score([make_sample("leak")] * 40) == [passed("leak")] * 40
        wait_for_end(ours)


def test_prints_go_to_the_log(verifiers: Path, make_sample: MakeSample, tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "reward.log"
    with make_pool("misbehaving:score", workers=1, timeout_seconds=PATIENT_SECONDS, log_file=log_file) as pool:
        pool.score([make_sample("print")])
    assert "a verifier speaks" in log_file.read_text()


def test_prints_stay_off_stdout(pool: RewardPool, make_sample: MakeSample, capfd: pytest.CaptureFixture[str]) -> None:
    assert pool.score([make_sample("print")])[0].score == 1.0
    assert capfd.readouterr().out == ""


def test_killed_idle_workers_are_replaced(pool: RewardPool, make_sample: MakeSample) -> None:
    for worker in workers():
        worker.kill()
    assert pool.score([make_sample("good")] * 9) == [passed("good")] * 9


@pytest.mark.parametrize(
    ("name", "text", "label"), [("countdown", "1 + 1 = 2 + 1 = 3 ok", "1 1 1 > 3"), ("math", "\\boxed{3}", "3")]
)
def test_built_in_rewards_run_in_a_pool(make_sample: MakeSample, name: str, text: str, label: str) -> None:
    with make_pool(name, workers=1, timeout_seconds=PATIENT_SECONDS) as pool:
        results = pool.score([make_sample(text, label), make_sample(text, None)])
    assert results[0].detail == "correct"
    assert results[1].outcome == "error" and results[1].detail.startswith("ValueError: ")


def test_a_wrong_name_fails_at_once() -> None:
    before = workers()
    with pytest.raises(UserError, match="has no 'verify'"):
        make_pool("megatron_rl.reward.countdown:verify", workers=2, timeout_seconds=1)
    assert workers() == before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process in the background of a shell ignores Ctrl-C, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_busy_workers(verifiers: Path, make_sample: MakeSample, tmp_path: Path) -> None:
    before = workers()
    with pytest.raises(KeyboardInterrupt), make_pool("misbehaving:score", workers=2, timeout_seconds=600) as pool:
        pool.score([make_sample("good")])
        ours = [worker for worker in workers() if worker not in before]
        reached = tmp_path / "reached"
        threading.Thread(target=interrupt_at, args=(reached,), daemon=True).start()
        pool.score([make_sample("signal", str(reached)), make_sample("stuck in C")])
    assert len(ours) == 2
    wait_for_end(ours)


def interrupt_at(file: Path) -> None:
    """Sends Ctrl-C to this process once the file exists."""
    while not file.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


@slow
def test_workers_end_with_their_parent(verifiers: Path) -> None:
    """They are idle or stuck, and the parent had no chance to stop them."""
    script = textwrap.dedent("""
        import os, threading, time
        from megatron_rl.config.reward import RewardSettings
        from megatron_rl.reward import RewardPool
        from megatron_rl.types import Prompt, Response, Sample

        def sample(text):
            return Sample(Prompt("x:0", (1,), "", None), Response([2], [0.0], "stop", 0), text)

        if __name__ == "__main__":
            pool = RewardPool(RewardSettings(name="misbehaving:score", workers=2, timeout_seconds=0.5))
            pool.score([sample("good")])
            threading.Thread(target=pool.score, args=([sample("stuck in C")],), daemon=True).start()
            time.sleep(0.2)
            print("ready", flush=True)
            time.sleep(60)
    """)
    (verifiers / "parent.py").write_text(script)
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{verifiers}"}
    with subprocess.Popen(
        [sys.executable, str(verifiers / "parent.py")], env=environment, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 2
        parent.kill()
    wait_for_end(children)
