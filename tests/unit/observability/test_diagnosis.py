"""Tests of the warnings: each is given once when its condition holds, and never otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.observability import DiagnosisSettings
from megatron_rl.observability.diagnosis import Diagnosis, Finding, History, read_findings, rules_of
from megatron_rl.observability.report import write_report

LP_REG = AlgorithmSettings()
HEALTHY = {
    "entropy/token_mean": 0.3,
    "lpreg/selected_fraction": 0.01,
    "lpreg/kept_fraction": 0.985,
    "response_length/truncated_fraction": 0.02,
    "reward/mean": 0.4,
    "logprob/fresh_abs_diff": 0.004,
    "rollout/staleness_max": 1.0,
}
TURNS: dict[str, Callable[[int], dict[str, float]]] = {
    "entropy_collapse": lambda step: {"entropy/token_mean": 0.3 * 0.9**step},
    "entropy_explosion": lambda step: {"entropy/token_mean": 0.3 * 1.1**step},
    "nothing_selected": lambda step: {"lpreg/selected_fraction": 0.0},
    "everything_kept": lambda step: {"lpreg/kept_fraction": 1.0},
    "truncation_growth": lambda step: {"response_length/truncated_fraction": min(1.0, 0.02 + 0.02 * step)},
    "reward_without_accuracy": lambda step: {"reward/mean": 0.4 + 0.01 * step, "eval/a/avg@8": 0.5 - 0.01 * step},
    "no_reward": lambda step: {"reward/mean": 0.0},
    "stale_weights": lambda step: {"rollout/staleness_max": 6.0},
    "gap_growth": lambda step: {"logprob/fresh_abs_diff": 0.004 * 1.2**step},
}


def go(diagnosis: Diagnosis, first: int, last: int, change: Callable[[int], dict[str, float]]) -> list[Finding]:
    return [
        finding
        for step in range(first, last + 1)
        for finding in diagnosis.step(step, HEALTHY | {"eval/a/avg@8": 0.5} | change(step - first + 1))
    ]


def test_every_rule_has_a_case_here() -> None:
    assert {rule.name for rule in rules_of(LP_REG)} == set(TURNS)


def test_a_healthy_run_gets_no_warning(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(), LP_REG, [])
    assert go(diagnosis, 1, 60, lambda step: {}) == []
    other = Diagnosis(tmp_path, DiagnosisSettings(), LP_REG, [])
    assert [finding for row in rows for finding in other.step(row["step"], row)] == []
    assert not (tmp_path / "warnings.jsonl").exists()


@pytest.mark.parametrize("name", TURNS)
def test_a_warning_is_given_once_with_its_threshold(name: str, tmp_path: Path) -> None:
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(), LP_REG, [])
    assert go(diagnosis, 1, 20, lambda step: {}) == []
    findings = [finding for finding in go(diagnosis, 21, 60, TURNS[name]) if finding.name == name]
    assert len(findings) == 1 and 21 < findings[0].step <= 60
    assert any(character.isdigit() for character in findings[0].what) and findings[0].remedy
    assert [finding for finding in read_findings(tmp_path) if finding.name == name] == findings


def test_a_warning_is_repeated_after_its_condition_stopped_holding(tmp_path: Path) -> None:
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=5), LP_REG, [])
    first = go(diagnosis, 1, 10, TURNS["no_reward"])
    assert go(diagnosis, 11, 20, lambda step: {}) == []
    second = go(diagnosis, 21, 30, TURNS["no_reward"])
    assert [finding.name for finding in first + second] == ["no_reward", "no_reward"]


def test_thresholds_are_settings(tmp_path: Path) -> None:
    def halved(step: int) -> dict[str, float]:
        return {"entropy/token_mean": 0.14}

    assert go(_after_twenty(tmp_path, DiagnosisSettings()), 21, 40, halved) == []
    found = go(_after_twenty(tmp_path, DiagnosisSettings(entropy_collapse=0.5)), 21, 40, halved)
    assert [finding.name for finding in found] == ["entropy_collapse"]


def _after_twenty(folder: Path, settings: DiagnosisSettings) -> Diagnosis:
    diagnosis = Diagnosis(folder, settings, LP_REG, [])
    go(diagnosis, 1, 20, lambda step: {})
    return diagnosis


def test_a_method_without_a_proxy_gets_no_warning_about_its_filter(tmp_path: Path) -> None:
    for name in ("grpo", "kl_cov", "high_entropy", "stapo", "entropy_bonus"):
        method = AlgorithmSettings.model_validate({"name": name})
        diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=2), method, [])
        metrics = {"lpreg/kept_fraction": 1.0, "reward/mean": 1.0, "lpreg/selected_fraction": 0.1}
        for step in range(1, 10):
            assert diagnosis.step(step, metrics) == []


def test_a_resumed_run_does_not_repeat_active_warnings(tmp_path: Path) -> None:
    """Warnings after the checkpoint are dropped, and a warning that was active at the checkpoint is not repeated."""
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=5), LP_REG, [])
    go(diagnosis, 1, 10, TURNS["no_reward"])
    go(diagnosis, 11, 30, TURNS["nothing_selected"])
    assert [finding.name for finding in read_findings(tmp_path)] == ["no_reward", "nothing_selected"]
    rows = [{"step": step, **HEALTHY, "reward/mean": 0.0} for step in range(1, 9)]
    resumed = Diagnosis(tmp_path, DiagnosisSettings(window=5), LP_REG, rows)
    assert [finding.name for finding in read_findings(tmp_path)] == ["no_reward"]
    assert go(resumed, 9, 20, TURNS["no_reward"]) == []


def test_the_report_lists_warnings(run_folder: Path) -> None:
    diagnosis = Diagnosis(run_folder, DiagnosisSettings(window=5), LP_REG, [])
    go(diagnosis, 1, 10, TURNS["no_reward"])
    text = write_report(run_folder).read_text()
    assert ">Warnings</h2>" in text and "<b>no_reward</b> from step 5: no response has had a reward" in text


def test_a_growing_gap_of_older_tokens_gives_no_warning(tmp_path: Path) -> None:
    """Asynchronous runs and continued partial rollouts have such tokens."""
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(), LP_REG, [])
    moving = {"rollout/staleness_max": 1.0}
    assert go(diagnosis, 1, 60, lambda step: {**moving, "logprob/rollout_actor_abs_diff": 0.004 * 1.2**step}) == []


def test_a_long_run_needs_no_more_memory_for_its_diagnosis() -> None:
    history = History(window=5)
    for step in range(1000):
        history.add({"step": step, "time": 1.0, "reward/mean": float(step), "eval/a/avg@8": -float(step), "none": None})
    values = history.of("reward/mean")
    assert (values.first, list(values.last), values.count) == ([0, 1, 2, 3, 4], [995, 996, 997, 998, 999], 1000)
    assert history.last("reward/mean") == list(values.last) and history.last("none") == []
    (evaluation,) = history.evaluations()
    assert evaluation.best == 0
