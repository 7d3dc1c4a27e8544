"""`megatron-rl eval` of a model folder, a run and a checkpoint; and a killed evaluation that is continued."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e_cpu.conftest import CommandLine, Finished, read_json, values
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

SUITES = """
max_response_tokens: 46
samples_per_prompt: 4
temperature: 1.0
reward: {name: countdown}
suites:
  held_out: held_out.jsonl
  greedy: {data: held_out.jsonl, temperature: 0.0, samples_per_prompt: 1}
"""


@pytest.fixture(scope="module")
def arguments(command_line: CommandLine) -> list[str]:
    (command_line.folder / "suites.yaml").write_text(SUITES)
    return ["--suites", "suites.yaml", "--data", "runs/countdown-task"]


def evaluate(command_line: CommandLine, *arguments: str) -> str:
    process = command_line.start("eval", *arguments)
    finished = command_line.finish(process, "eval")
    assert finished.status == 0, finished.output[-3000:]
    return finished.output


def test_a_killed_evaluation_continues_with_the_same_result(command_line: CommandLine, arguments: list[str]) -> None:
    model = "runs/countdown-task/model"
    evaluate(command_line, model, *arguments, "--batch", "8", "--out", "complete")
    process = command_line.start("eval", model, *arguments, "--batch", "8", "--out", "killed")
    part = command_line.folder / "killed/held_out.parts/000008.parquet"
    while not part.exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert part.exists() and not (command_line.folder / "killed/greedy.parquet").exists()

    output = evaluate(command_line, model, *arguments, "--batch", "8", "--out", "killed")
    assert "held_out: 0 of 101" in output and "macro mean" in output
    for name in ("held_out.parquet", "greedy.parquet", "summary.json"):
        complete, killed = (command_line.folder / folder / name for folder in ("complete", "killed"))
        assert complete.read_bytes() == killed.read_bytes(), name


def test_a_run_its_checkpoint_and_its_export_score_the_same(
    command_line: CommandLine, arguments: list[str], learned: Finished
) -> None:
    """Their score is also that of the run's own evaluation: the same code evaluates during training."""
    folder = Path("runs/learned")
    for model, out in ((folder, "run"), (folder / "checkpoints/step_000040", "checkpoint"), (folder / "hf", "hf")):
        evaluate(command_line, str(model), *arguments, "--out", out)
    found = [read_json(command_line.folder / out / "summary.json") for out in ("run", "checkpoint", "hf")]
    assert found[0] == found[1] == found[2]
    during = values(learned, "eval/held_out/avg@8")[-1]
    assert 0 < during < 1
    suite = found[0]["suites"]["held_out"]
    assert suite["avg@4"]["low"] - 0.1 < during < suite["avg@4"]["high"] + 0.1
    assert (command_line.folder / "runs/learned/evaluations/step_000040/held_out.parquet").is_file()
