"""Whole runs with real servers: refused where log-probs are wrong, gone on with when servers die, stopped in order when
none can be brought back, and nothing left of them when the driver is killed."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from megatron_rl.rollout.servers import guard
from megatron_rl.utils.heartbeat import FOLDER
from tests.e2e_cpu.conftest import QUICKSTART, CommandLine, Finished
from tests.engines.conftest import server_processes

PROMPTS, SAMPLES = 8, 4
SMALL = (
    "warm_start=null",
    "algorithm.name=grpo",
    "reward.name=tests.engines.reward:odd",
    "rollout.temperature=0.8",
    f"rollout.prompts_per_step={PROMPTS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "actor.tensor_parallel=1",
    "evaluation.suites={}",
    "evaluation.probes={}",
    "observability.rollouts_every=1",
    "train.save_every=0",
)


def computing(server: list[psutil.Process]) -> list[psutil.Process]:
    """The processes of vLLM behind the one that speaks HTTP."""
    found = [process for process in server[1:] if " ".join(process.cmdline()).startswith("VLLM::")]
    assert found, [process.cmdline() for process in server]
    return found


class Training:
    """A run under way, and its servers."""

    def __init__(self, command_line: CommandLine, kind: str, name: str, *overrides: str) -> None:
        self.command_line, self.name, self.said = command_line, name, ""
        config = QUICKSTART.with_name(f"countdown_{kind}.yaml")
        self.process: subprocess.Popen[str] = command_line.start(
            "train", str(config), f"run.name={name}", *SMALL, *overrides
        )

    def until(self, text: str) -> None:
        """Read on until it says so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        raise AssertionError(f"it ended without saying {text!r}:\n{self.said[-5000:]}")

    def until_sending(self) -> None:
        """Wait until the actor broadcasts weights, which it does until all engines have them."""
        beat = self.command_line.folder / "runs" / self.name / "logs" / FOLDER / "actor-rank-0.json"
        while json.loads(beat.read_text())["call"] != "push_weights":
            assert self.process.poll() is None

    def servers(self) -> list[list[psutil.Process]]:
        """The processes of each, the first one first; in the order of their start."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        leaders = [p for p in tree if guard.__file__ in p.cmdline() and os.getpgid(p.pid) == p.pid]
        return [server_processes(leader) for leader in sorted(leaders, key=psutil.Process.create_time)]

    def end(self) -> Finished:
        finished = self.command_line.finish(self.process, self.name)
        return Finished(finished.folder, finished.status, self.said + finished.output)


def rollouts(run: Finished) -> Iterator[list[dict[str, object]]]:
    """Rows of each step, in order."""
    for path in sorted((run.folder / "rollouts").glob("step_*.parquet")):
        yield pq.ParquetFile(path).read(["prompt_id", "group", "weight_versions"]).to_pylist()


def assert_nothing_was_lost_or_counted_twice(run: Finished) -> None:
    """Every step has all its samples, all from the weights of the step; no prompt was drawn again in an epoch."""
    drawn: Counter[object] = Counter()
    steps, found = [row for row in run.metrics if row["step"]], list(rollouts(run))
    assert len(found) - len(steps) in (0, 1)  # a driver that is killed may have written one without the other
    for row, metrics in zip(found, steps, strict=False):
        samples = Counter((sample["prompt_id"], sample["group"]) for sample in row)
        assert list(samples.values()) == [SAMPLES] * PROMPTS
        versions = {version for sample in row for version in sample["weight_versions"]}  # type: ignore[attr-defined]
        assert len(versions) == 1, versions
        drawn.update(prompt for prompt, _ in samples)
        assert metrics["logprob/rollout_actor_abs_diff"] < 1e-4
    problems = len((run.folder.parent / "countdown-task/train.jsonl").read_text().splitlines())
    epochs, more = divmod(drawn.total(), problems)
    times = Counter(drawn.values())
    assert times[epochs + 1] == more and times[epochs] == (problems - more if epochs else 0), times


def assert_it_goes_on(run: Training, losses: int) -> Finished:
    """To a next step, after so many processes were lost; then it is stopped."""
    run.until("step=")
    run.process.send_signal(signal.SIGINT)
    ended = run.end()
    assert ended.status == 0, ended.output
    assert ended.output.count("is lost") == losses
    assert_nothing_was_lost_or_counted_twice(ended)
    return ended


RAW = {
    "vllm": "rollout.server.arguments=[--logprobs-mode,raw_logprobs]",
    "sglang": "rollout.server.environment={SGLANG_RETURN_ORIGINAL_LOGPROB: '1'}",
}


@pytest.mark.parametrize("kind", RAW)
def test_raw_log_probs_are_refused(command_line: CommandLine, kind: str) -> None:
    """By two tensor-parallel ranks: all but the temperature is as it should be, weights and log-probs."""
    run = Training(command_line, kind, f"raw-{kind}", RAW[kind], "rollout.server.tensor_parallel=2").end()
    assert run.status == 2, run.output
    assert "Likely cause: raw instead of processed log-probs: they are those at temperature 1, not at 0.8" in run.output
    assert not run.metrics
    assert "Traceback" not in run.output


@pytest.mark.parametrize(("kind", "ranks"), [("vllm", 1), ("sglang", 2)])
def test_weights_through_mapped_memory(command_line: CommandLine, kind: str, ranks: int) -> None:
    """Of two pipeline stages, in several buckets each, to a server that gives its memory back in between; every update
    is compared on both sides."""
    run = Training(
        CommandLine(command_line.folder, "tests.engines.mapped_on_cpu"),
        kind,
        f"mapped-{kind}",
        "weight_sync={transport: cuda_ipc, bucket_megabytes: 1, verify_every: 1}",
        "actor.pipeline_parallel=2",
        f"rollout.server.tensor_parallel={ranks}",
        "cluster.colocate=true",
        "train.steps=2",
    ).end()
    assert run.status == 0, run.output
    assert "has not got weight version" not in run.output
    assert_nothing_was_lost_or_counted_twice(run)
    assert [metrics["weight_sync/bytes"] for metrics in run.metrics if metrics["step"]] == [2412288.0] * 2


@pytest.mark.timeout(600)  # three servers start, and one is waited for
def test_servers_that_are_killed_or_hang_are_replaced(command_line: CommandLine) -> None:
    """One is killed; and when another serves in its place, the second one is stopped in the middle of a broadcast, in
    which the first waits for it."""
    run = Training(
        command_line,
        "vllm",
        "failures",
        "rollout.engines=2",
        "rollout.server.hang_seconds=20",
        "weight_sync.transport=collective",
        "train.steps=2000",  # more than are taken until the servers are back, however fast
    )
    run.until("step=1/")
    first, second = run.servers()
    first[0].kill()
    run.until("is lost, another takes its place: its server has ended")
    run.until("step=")
    run.until("serves again")
    run.until_sending()
    for process in reversed(second):  # what computes before what speaks HTTP
        process.suspend()
    run.until("is lost, another takes its place: it has given no sign of life for ")
    ended = assert_it_goes_on(run, losses=2)
    if "no sign of life for 40 s" in ended.output:  # else it had all of the broadcast already: 20 s
        assert re.search(r"engine \d has not got weight version \d+ whole: ", ended.output)
    assert "log-probs of 2 engines and of the actor agree" in ended.output


def test_a_server_without_memory_is_replaced(command_line: CommandLine) -> None:
    """What computes in the only one gets no more: it ends, or stops answering, or answers but cannot take an update."""
    run = Training(
        command_line,
        "vllm",
        "memory",
        "rollout.server.hang_seconds=20",
        "train.steps=2000",
    )
    run.until("step=1/")
    (server,) = run.servers()
    for process in computing(server):
        process.rlimit(resource.RLIMIT_DATA, (2**20, 2**20))
    run.until("is lost, another takes its place: ")
    run.until("serves again")
    assert_it_goes_on(run, losses=1)


def test_without_engines_it_stops_with_a_checkpoint_and_goes_on_from_it(command_line: CommandLine) -> None:
    """And when the driver is killed, its servers end as well."""
    settings = ("rollout.server.outage_seconds=5", "train.steps=2000")
    run = Training(command_line, "sglang", "outage", *settings)
    run.until("step=1/")
    (server,) = run.servers()
    server[0].kill()
    stopped = run.end()
    assert stopped.status == 2, stopped.output
    last = stopped.metrics[-1]["step"]
    assert "no engine could be brought back for 5 s (rollout.server.outage_seconds)" in stopped.output
    assert f"checkpoint: {Path('runs/outage/checkpoints')}/step_{last:06d}" in stopped.output
    assert f"go on after step {last}" in stopped.output
    assert "Traceback" not in stopped.output

    resumed = Training(command_line, "sglang", "outage", *settings, "resume=auto")
    resumed.until(f"step={last + 1}/")
    (server,) = resumed.servers()
    os.kill(resumed.process.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(server, timeout=30)
    assert not left
    killed = resumed.end()  # which looks for any other process that is left
    assert killed.status == -signal.SIGKILL
    assert [row["step"] for row in killed.metrics] == list(range(len(killed.metrics)))
    assert_nothing_was_lost_or_counted_twice(killed)
