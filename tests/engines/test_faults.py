"""Whole runs whose server fails in every way except that it ends: status 500, dropped connections, lost and slow
answers and failed calls to abort, during sampling and weight updates; and a server that somebody else restarts."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout.servers.http_engine import HttpEngine
from tests.e2e_cpu.conftest import CommandLine, Finished
from tests.engines.conftest import Run, launch
from tests.engines.fault_proxy import Script, fault_proxy
from tests.engines.test_training import PROMPTS, SAMPLES, Training, rollouts

STEPS = 14
GOOD = [""]
SOME = ["error", "error", "drop", "lost", "slow"]
ATTEMPTS = len(SOME) + 1
"""Attempts of a request. Which request meets the next fault is random, and one request may meet them all."""
CHECKS = 2
"""Checks of the log-prob contract before the first step. SGLang gets a request per prompt; vLLM gets the requests of
one moment as a batch, and the failed ones again one by one."""
FAULTS = {
    "sglang": {
        "/generate": [*GOOD * CHECKS * PROMPTS, *SOME, *GOOD * 4 * PROMPTS, "restarted"],
        "/abort_request": ["error", "drop"],
        "/begin_weight_update": [*GOOD * 2, "lost"],
        "/update_weights_from_distributed": [*GOOD * 14, "error", *GOOD * 5, "lost"],
        "/end_weight_update": [*GOOD * 6, "drop"],
    },
    "vllm": {
        "/arrays/generate": [*GOOD * CHECKS, *SOME, *GOOD * 12, "down"],
        "/start_weight_update": [*GOOD * 2, "lost", *GOOD, "error"],
        "/update_weights": [*GOOD * 14, "error", *GOOD * 5, "lost", *GOOD * 3, "slow"],
        "/finish_weight_update": [*GOOD * 6, "drop", "lost"],
    },
}
LOSSES = {"sglang": ["it serves weights -1"], "vllm": [f"a request failed {ATTEMPTS} times"]}
UPDATE_PATH = {"sglang": "/begin_weight_update", "vllm": "/start_weight_update"}
SETTINGS = {
    "sglang": (
        "weight_sync.transport=collective",
        "rollout.over_sampling=1.5",
        "rollout.max_staleness=1",
        "algorithm.correction.weights=truncated",
    ),
    "vllm": ("weight_sync.transport=shared_memory",),
}
LIMITS = (
    f"rollout.server.request_attempts={ATTEMPTS}",
    "rollout.server.request_timeout_seconds=20",
    "rollout.server.update_timeout_seconds=20",
    "weight_sync.bucket_megabytes=1",
)


@pytest.fixture
def successor(engine: HttpEngine, run: Run[Any], model: Path) -> Iterator[HttpEngine | None]:
    """A second server that has just started, if a fault needs one."""
    if not any("restarted" in faults for faults in FAULTS[engine.kind.name].values()):
        yield None
        return
    successor = HttpEngine(launch(engine.kind.name, model))
    run(successor.start())
    yield successor
    run(successor.close())


def assert_each_sample_is_there_once(run: Finished, staleness: int) -> None:
    """Every step has all its samples, none of them older than the allowed staleness; no prompt is drawn twice."""
    drawn: Counter[object] = Counter()
    steps = list(rollouts(run))
    assert len(steps) == STEPS
    for version, rows in enumerate(steps):
        samples = Counter((row["prompt_id"], row["group"]) for row in rows)
        assert list(samples.values()) == [SAMPLES] * PROMPTS
        versions = {version for row in rows for version in row["weight_versions"]}  # type: ignore[attr-defined]
        assert versions <= set(range(version - staleness, version + 1)) and version in versions, versions
        drawn.update(prompt for prompt, _ in samples)
    assert set(drawn.values()) == {1}


def test_a_run_with_a_failing_server_takes_all_its_steps(
    lent: HttpEngine, successor: HttpEngine | None, command_line: CommandLine
) -> None:
    kind = lent.kind.name
    script = Script(lent, {path: deque(faults) for path, faults in FAULTS[kind].items()}, successor)
    with fault_proxy(script, UPDATE_PATH[kind]) as url:
        settings = (f"rollout.server.urls=[{url}]", f"train.steps={STEPS}", *SETTINGS[kind], *LIMITS)
        ended = Training(command_line, kind, f"faults-{kind}", *settings).end()
    assert ended.status == 0, ended.output
    assert not any(script.faults.values()), "some faults were not met"
    assert [row["step"] for row in ended.metrics] == list(range(STEPS + 1))
    assert_each_sample_is_there_once(ended, staleness=1 if kind == "sglang" else 0)

    reasons = re.findall(r"engine 0 is lost, another takes its place: (.*?)(?:, not \d+)?\n", ended.output)
    assert reasons == LOSSES[kind]
    assert ended.output.count("engine 0 serves again") == len(reasons)
    assert re.search(r"engine 0 did not get weight version \d+ completely: ", ended.output)
    assert "Traceback" not in ended.output
    log = (ended.folder / "logs/engine-0.log").read_text()
    for error in ("status 500, the proxy was told to fail", "ServerDisconnectedError", "TimeoutError"):
        assert re.search(rf"request failed, attempt \d of {ATTEMPTS}: POST \S+: {error}", log), error
