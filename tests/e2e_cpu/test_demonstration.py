"""The demonstration of `make quickstart`, shortened: both methods train at the same time and are compared."""

from __future__ import annotations

import json

import pytest

from megatron_rl.observability.metrics import read_metrics
from tests.e2e_cpu.conftest import SHORT_WARM_START, CommandLine
from tests.tiers import slow

pytestmark = pytest.mark.e2e


@slow
def test_both_methods_train_from_one_warm_start_on_the_same_prompts(command_line: CommandLine) -> None:
    program = CommandLine(command_line.folder, "examples.quickstart.demonstration")
    short = [text for text in SHORT_WARM_START if text.startswith("warm_start.")]
    short += ["warm_start.cache_folder=runs/new-cache", "train.steps=2", "evaluation.every=0"]
    process = program.start(*short)
    finished = program.finish(process, "")
    assert finished.status == 0, finished.output[-5000:]

    (folder,) = (command_line.folder / "runs").glob("quickstart-*")
    first = {method: read_metrics(folder / method)[0] for method in ("grpo", "lp_reg")}
    same = [{name: row[name] for name in row if name.startswith("eval/")} for row in first.values()]
    assert same[0] == same[1]  # the same model answers the same problems
    prompts = [json.dumps(_prompts(folder / method)) for method in first]
    assert prompts[0] == prompts[1]

    logs = [(folder / f"{method}.log").read_text() for method in first]
    assert sum(log.count(" steps in ") for log in logs) == 2  # each phase of the warm start was trained once
    assert (folder / "report.html").is_file()
    words = (folder / "conclusion.txt").read_text()
    assert "On 121 fresh problems" in words and "Lp-Reg" in words
    assert "\x1b" not in finished.output


def _prompts(run: object) -> list[str]:
    import pyarrow.parquet as pq

    rows: list[str] = pq.read_table(f"{run}/rollouts/step_000001.parquet", columns=["prompt"])["prompt"].to_pylist()
    return rows
