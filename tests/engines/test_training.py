"""Whole runs with real servers: wrong log-probs are refused, dead servers are replaced, a run without servers stops in
order, and no server outlives a killed driver."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
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
from tests.patience import command_of, is_alive

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
    """The processes of vLLM behind its HTTP process."""
    found = [process for process in server[1:] if " ".join(command_of(process)).startswith("VLLM::")]
    assert found, [command_of(process) for process in server]
    return found


class Training:
    """A run and its servers."""

    def __init__(self, command_line: CommandLine, kind: str, name: str, *overrides: str) -> None:
        self.command_line, self.name, self.output = command_line, name, ""
        config = QUICKSTART.with_name(f"countdown_{kind}.yaml")
        self.process: subprocess.Popen[str] = command_line.start(
            "train", str(config), f"run.name={name}", *SMALL, *overrides
        )

    def until(self, text: str) -> None:
        """Reads the output up to a line with this text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"it ended without {text!r} in its output:\n{self.output[-5000:]}")

    def until_sending(self) -> None:
        """Waits until the actor broadcasts weights, which lasts until all engines have them."""
        beat = self.command_line.folder / "runs" / self.name / "logs" / FOLDER / "actor-rank-0.json"
        while json.loads(beat.read_text())["call"] != "push_weights":
            assert self.process.poll() is None

    def servers(self) -> list[list[psutil.Process]]:
        """The processes of each server; servers and processes are in the order of their start."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        leaders = [p for p in tree if guard.__file__ in command_of(p) and os.getpgid(p.pid) == p.pid]
        return [server_processes(leader) for leader in sorted(leaders, key=psutil.Process.create_time)]

    def end(self) -> Finished:
        finished = self.command_line.finish(self.process, self.name)
        return Finished(finished.folder, finished.status, self.output + finished.output)


def rollouts(run: Finished) -> Iterator[list[dict[str, object]]]:
    """The recorded rows of each step, in order."""
    for path in sorted((run.folder / "rollouts").glob("step_*.parquet")):
        yield pq.ParquetFile(path).read(["prompt_id", "group", "weight_versions"]).to_pylist()


def assert_nothing_was_lost_or_counted_twice(run: Finished) -> None:
    """Every step has all its samples, all from the weights of the step; no prompt is drawn twice in an epoch."""
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


def assert_it_continues(run: Training, losses: int) -> Finished:
    """The run reaches a next step after so many losses of processes; then it is interrupted."""
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


@pytest.mark.parametrize(("kind", "ranks"), [("vllm", 2), ("sglang", 1)])
def test_raw_log_probs_are_refused(command_line: CommandLine, kind: str, ranks: int) -> None:
    """Everything is right except that log-probs are at temperature 1."""
    settings = (RAW[kind], f"rollout.server.tensor_parallel={ranks}")
    run = Training(command_line, kind, f"raw-{kind}", *settings).end()
    assert run.status == 2, run.output
    assert "Likely cause: raw instead of processed log-probs: they are those at temperature 1, not at 0.8" in run.output
    assert not run.metrics
    assert "Traceback" not in run.output


@pytest.mark.parametrize(("kind", "ranks"), [("vllm", 1), ("sglang", 2)])
def test_weights_through_mapped_memory(command_line: CommandLine, kind: str, ranks: int) -> None:
    """Two pipeline stages send several buckets each to a server that releases its memory between updates; every update
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
    assert "did not get weight version" not in run.output
    assert_nothing_was_lost_or_counted_twice(run)
    assert [metrics["weight_sync/bytes"] for metrics in run.metrics if metrics["step"]] == [2412288.0] * 2


def test_killed_and_hung_servers_are_replaced(command_line: CommandLine) -> None:
    """One server is killed. Once its replacement serves, the other server is stopped in the middle of a broadcast,
    which blocks the replacement."""
    run = Training(
        command_line,
        "vllm",
        "failures",
        "rollout.engines=2",
        "rollout.server.hang_seconds=20",
        "weight_sync.transport=collective",
        "train.steps=2000",  # more steps than the run takes until the servers are back
    )
    run.until("step=1/")
    first, second = run.servers()
    first[0].kill()
    run.until("is lost, another takes its place: its server has ended")
    run.until("step=")
    run.until("serves again")
    run.until_sending()
    for process in reversed(second):  # the computing processes before the HTTP process
        process.suspend()
    run.until("is lost, another takes its place: it has given no sign of life for ")
    ended = assert_it_continues(run, losses=2)
    if "no sign of life for 40 s" in ended.output:  # 20 s: the server had the whole broadcast already
        assert re.search(r"engine \d did not get weight version \d+ completely: ", ended.output)
    assert "log-probs of 2 engines and of the actor agree" in ended.output


def test_a_server_without_memory_is_replaced(command_line: CommandLine) -> None:
    """The computing processes of the only server get no more memory: the server ends, hangs, or fails to take
    updates."""
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
    assert_it_continues(run, losses=1)


@pytest.mark.sglang
def test_a_run_without_engines_stops_with_a_checkpoint_and_can_be_resumed(command_line: CommandLine) -> None:
    """When the resumed run's driver is killed, its servers end too."""
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
    assert f"continue after step {last}" in stopped.output
    assert "Traceback" not in stopped.output

    resumed = Training(command_line, "sglang", "outage", *settings, "resume=auto")
    resumed.until(f"step={last + 1}/")
    (server,) = resumed.servers()
    os.kill(resumed.process.pid, signal.SIGKILL)
    while any(is_alive(process) for process in server):
        time.sleep(0.1)
    killed = resumed.end()  # it also checks that no other process is left
    assert killed.status == -signal.SIGKILL
    assert [row["step"] for row in killed.metrics] == list(range(len(killed.metrics)))
    assert_nothing_was_lost_or_counted_twice(killed)


@pytest.mark.sglang
def test_a_run_continues_when_an_engine_and_then_the_router_is_killed(command_line: CommandLine) -> None:
    run = Training(
        command_line,
        "sglang",
        "routed",
        "rollout.engines=2",
        "rollout.server.router=round_robin",
        "train.steps=2000",  # more steps than the run takes until all are back
    )
    run.until("step=1/")
    servers = [server[0] for server in run.servers()]
    (router,) = [server for server in servers if "router" in " ".join(command_of(server))]
    next(server for server in servers if server != router).kill()
    run.until("is lost, another takes its place: its server has ended")
    run.until("step=")
    run.until("serves again")
    run.until("step=")
    router.kill()
    run.until("the router is lost, another takes its place: its server has ended")
    run.until("the router serves again")
    assert_it_continues(run, losses=2)
