"""An evaluation from its protocol to its summary, with and without an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.evaluation import ProtocolSettings
from megatron_rl.errors import UserError
from megatron_rl.evaluation.evaluate import Evaluation, Progress
from megatron_rl.evaluation.problems import read_problems
from megatron_rl.evaluation.table import table_of
from megatron_rl.reward.trial import TRIAL_RESPONSE
from megatron_rl.types import Prompt, Sample, SamplingParams
from tests.tiers import quick_of
from tests.unit.evaluation.conftest import ScriptedSource


def run(protocol: ProtocolSettings, source: Any, folder: Path, **more: Any) -> list[Progress]:
    seen: list[Progress] = []
    Evaluation(protocol, source, folder, **{"seed": 0, "batch": 3} | more).run(seen.append)
    return seen


def test_each_suite_is_sampled_with_its_own_settings(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path
) -> None:
    seen = run(protocol, source, tmp_path / "out")
    assert [len(batch) for batch in source.asked] == [3, 3, 1, 3, 1]
    assert [(s.n, s.temperature, s.max_tokens) for s in source.samplings] == [(2, 1.0, 8192)] * 3 + [(4, 0.5, 8192)] * 2
    assert len({sampling.seed for sampling in source.samplings[:3]}) == 3
    assert seen[-1] == Progress("four", 4, 4, 0.5)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    seven, four = summary["suites"]["seven"], summary["suites"]["four"]
    assert (seven["problems"], seven["avg@2"]["value"]) == (7, pytest.approx(4 / 7))
    assert {"pass@1", "pass@2", "pass@4", "maj@4"} <= set(four)
    assert four["truncated_fraction"] == 0.25 and four["response_length"] == 2.5
    assert summary["macro_mean"]["value"] == pytest.approx((4 / 7 + 1 / 2) / 2)
    rows = read_problems(tmp_path / "out/seven.parquet")
    assert [row.id for row in rows] == [f"seven:{n}" for n in range(7)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "four.parquet",
        "reward.log",
        "seven.parquet",
        "summary.json",
    ]


class Dies(ScriptedSource):
    """Raises KeyboardInterrupt after some batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().sample(prompts, sampling)


@pytest.mark.parametrize("batches", quick_of(range(5), (0, 3)))
def test_an_interrupted_evaluation_continues_where_it_stopped(
    protocol: ProtocolSettings, tmp_path: Path, batches: int
) -> None:
    run(protocol, ScriptedSource(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(protocol, Dies(batches), tmp_path / "cut")
    rest = ScriptedSource()
    run(protocol, rest, tmp_path / "cut")
    assert len(rest.asked) == 5 - batches, "nothing is sampled twice"
    for name in ("summary.json", "seven.parquet", "four.parquet"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = ScriptedSource()
    run(protocol, again, tmp_path / "cut")
    assert again.asked == []


def test_a_protocol_without_newer_sections_is_that_of_earlier_versions(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path
) -> None:
    run(protocol, source, tmp_path / "out")
    identity = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert "agent" not in identity["protocol"]
    assert all("tasks" not in suite and "data" in suite for suite in identity["protocol"]["suites"].values())


def test_a_row_without_what_the_agent_needs_is_refused(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path
) -> None:
    with_agent = protocol.model_copy(update={"agent": AgentSettings(function="harbor")})
    with pytest.raises(UserError, match="line 1: the row has no column task, which the agent harbor needs"):
        run(with_agent, source, tmp_path / "out")


def test_a_folder_of_another_evaluation_is_refused(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path
) -> None:
    run(protocol, source, tmp_path / "out")
    with pytest.raises(UserError, match="holds an evaluation with another seed"):
        run(protocol, source, tmp_path / "out", seed=1)
    other = ScriptedSource()
    other.identity = {"model": "other"}
    with pytest.raises(UserError, match="another source"):
        run(protocol, other, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no evaluation"):
        run(protocol, source, tmp_path / "full")


def test_a_verifier_that_fails_stops_the_evaluation(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward scores the response of the trial call, and no other."""
    (tmp_path / "choosy.py").write_text(f"def score(sample):\n    return {{{TRIAL_RESPONSE!r}: 0.0}}[sample.text]\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = protocol.reward.model_copy(update={"name": "choosy:score", "timeout_seconds": 600.0})
    with pytest.raises(UserError, match=r"6 of 6 samples could not be graded.*(\n.*)*KeyError"):
        run(protocol.model_copy(update={"reward": reward}), source, tmp_path / "out")


def test_labels_that_the_verifier_cannot_use_are_refused_before_the_folder_is_made(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path
) -> None:
    reward = protocol.reward.model_copy(update={"name": "countdown"})
    with pytest.raises(UserError, match=r"jsonl, line 1: reward.name: countdown cannot use the label"):
        run(protocol.model_copy(update={"reward": reward}), source, tmp_path / "out")
    assert source.asked == [] and not (tmp_path / "out").exists()


def test_a_reward_that_cannot_score_is_refused_before_the_folder_is_made(
    protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wordy.py").write_text("def score(sample):\n    return 'right'\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = protocol.reward.model_copy(update={"name": "wordy:score", "timeout_seconds": 600.0})
    with pytest.raises(UserError, match="the score is str 'right', not a number"):
        run(protocol.model_copy(update={"reward": reward}), source, tmp_path / "out")
    assert source.asked == [] and not (tmp_path / "out").exists()


def test_the_table(protocol: ProtocolSettings, source: ScriptedSource, tmp_path: Path) -> None:
    from rich.console import Console

    measures = Evaluation(protocol, source, tmp_path / "out", seed=0, batch=3).run(lambda progress: None)
    console = Console(width=140, record=True, quiet=False, file=(tmp_path / "table.txt").open("w"))
    console.print(table_of(measures, "a title"))
    text = console.export_text()
    assert "57.1 [" in text and "50.0 [" in text and "macro mean" in text and "53.6 [" in text
