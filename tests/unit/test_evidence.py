"""The evidence's command: its arms load, its statistics are right, and it continues where it was stopped."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import long_tail, runs
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.claims import CLAIMS, Claim, paired
from benchmarks.evidence.half_push import HalfPush, HalfPushSettings
from benchmarks.evidence.plan import MAIN, PLANS, Plan, Run, settings_of
from benchmarks.evidence.statistics import Mean, sign_flip_p, t95
from benchmarks.evidence.tables import evidence_tables
from lpreg import LossInputs
from megatron_rl.config import load_config
from megatron_rl.config.methods import method_needs
from megatron_rl.types import Prompt, Response, Sample

SMALL = Plan(("grpo", "lp_reg-k3"), (0, 1), (0, 1), 10, 8, tuned=True)


def result(run: Run, accuracy: float) -> dict[str, Any]:
    measures = ("accuracy", "pass@1", "pass@8", "entropy", "length", "spark", "noise", "tuning")
    place = {"arm": run.arm, "warm_start": run.warm_start, "seed": run.seed, "steps": run.steps}
    return place | {
        "settings": list(run.settings),
        "before": dict.fromkeys(measures, 0.5),
        "after": dict.fromkeys(measures, accuracy),
        "regularised": 0.01 if "lp_reg" in run.arm else None,
    }


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_configuration(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With each of its values, and with those of the arm that it follows."""
    monkeypatch.setattr(runs, "write_task", lambda *_, **__: None)
    monkeypatch.setattr(long_tail, "write", lambda *_: None)
    tuned = ARMS[arm].tuned or ("", (None,))
    for value in tuned[1]:
        chosen = {arm: value} if ARMS[arm].tuned else {"lp_reg-lagged": 0.2, "lp_reg-k3-tail": 0.2}
        (run,) = Plan((arm,), (1,), (3,), 150, 64).compared(chosen)
        config = load_config(run.config, runs.command(run)[5:])
        method_needs(config.algorithm)
        assert (config.seed, config.resume, config.prepare) == (3, "auto", None) and config.warm_start
        assert config.train.steps == (38 if ARMS[arm].kind == "off-policy" else 150)
        assert config.train.updates_per_rollout == (8 if ARMS[arm].kind == "off-policy" else 1)
        assert config.evaluation.suites["fresh"].samples_per_prompt == 64
        tail = ARMS[arm].kind == "long tail"
        assert config.model.path == Path(f"runs/countdown-{'tail' if tail else 'task'}-1/model")
        assert len(config.warm_start.phases) == (3 if tail else 2)


def test_arms_differ_and_claims_name_known_ones() -> None:
    assert len({(settings_of(arm, {}), ARMS[arm].kind) for arm in ARMS}) == len(ARMS)
    assert {claim.arm for claim in CLAIMS} | {claim.against for claim in CLAIMS} <= {None, *ARMS}
    assert set(MAIN) <= set(PLANS["full"].arms) == set(ARMS) and set(PLANS["quick"].arms) <= set(ARMS)


def test_every_place_has_all_arms_before_the_next_one_begins() -> None:
    order = [(run.seed, run.warm_start, run.arm) for run in SMALL.compared({})]
    assert order[:4] == [(0, 0, "grpo"), (0, 0, "lp_reg-k3"), (0, 1, "grpo"), (0, 1, "lp_reg-k3")]
    assert len({run.name for run in SMALL.compared({})}) == 8


def test_tuning_takes_the_best_value_and_other_settings_make_another_run() -> None:
    results: dict[str, dict[str, Any]] = {}
    for _, value, run in SMALL.tuning():
        assert SMALL.chosen(results) is None
        results[run.name] = result(run, 0.9 if value in (0.2, 1.5e-4) else 0.4)
    chosen = SMALL.chosen(results)
    assert chosen == {"grpo": 1.5e-4, "lp_reg-k3": 0.2}
    usual, tuned = list(SMALL.compared({})), list(SMALL.compared(chosen))
    assert all(one.name != other.name for one, other in zip(usual, tuned, strict=True))
    assert "algorithm.lp_reg.rho=0.2" in tuned[1].settings


def test_the_command_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each started process ends at once. The first call has time for two runs, the second for all."""
    import subprocess

    started: list[str] = []

    def start(run: Run) -> subprocess.Popen[bytes]:
        started.append(run.name)
        return subprocess.Popen([sys.executable, "-S", "-c", ""])

    monkeypatch.setattr(command, "start", start)
    monkeypatch.setattr(command, "outcome", lambda run: result(run, 0.5))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    wanted, file = list(SMALL.compared({})), tmp_path / "results.json"
    assert not command.train(wanted, command.Results(file, "quick"), 1, lambda: len(started) < 2)
    assert list(json.loads(file.read_text())["runs"]) == started == [run.name for run in wanted[:2]]
    assert command.train(wanted, command.Results(file, "quick"), 3, lambda: True)
    assert sorted(started) == sorted(run.name for run in wanted)
    assert len(json.loads(file.read_text())["runs"]) == len(wanted)


def test_a_failed_run_ends_the_command_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    (run, *_) = SMALL.compared({})
    (tmp_path / f"{run.name}.log").write_text("first\nout of luck\n")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(
        command, "start", lambda _: subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    )
    with pytest.raises(SystemExit, match=f"{run.name} failed:\nfirst\nout of luck"):
        command.train([run], command.Results(tmp_path / "results.json", "quick"), 1, lambda: True)


def test_the_interval_is_that_of_student() -> None:
    """Example: five values with mean 3 and variance 2.5."""
    mean = Mean.of([1, 2, 3, 4, 5])
    assert (mean.value, mean.count) == (3, 5)
    assert (mean.high - 3, 3 - mean.low) == pytest.approx([2.776 * math.sqrt(0.5)] * 2)
    assert math.isnan(Mean.of([1.0]).low)


def test_the_exact_test_counts_choices_of_signs() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([3.0, -1.0]) == 1.0
    assert sign_flip_p([3.0, 2.0, -1.0]) == 4 / 8
    assert sign_flip_p([0.1] * 10) == 2 / 1024


def test_verdicts_follow_the_interval() -> None:
    higher, lower = (Claim("paper", "", "grpo", None, "entropy", higher=side) for side in (True, False))
    clear, unclear = [0.1, 0.2, 0.1, 0.2, 0.15], [0.1, -0.2, 0.1, 0.2, -0.15]
    assert (higher.verdict(clear), lower.verdict(clear)) == ("**shown**", "**contradicted**")
    assert higher.verdict(unclear) == "not shown"
    assert higher.verdict(clear[:4]) == "not shown (4 of 5 pairs)"


def test_differences_are_paired_by_place_and_the_page_shows_them() -> None:
    plan = PLANS["quick"]
    wanted = [run for run in plan.compared({}) if run.arm in ("grpo", "lp_reg-lagged")][:-1]
    found = [result(run, 0.5 + 0.1 * (run.arm != "grpo") + 0.01 * run.seed) for run in wanted]
    assert paired(found, "lp_reg-lagged", "grpo", "pass@8") == pytest.approx([0.1] * 4)
    text = evidence_tables({"plan": "quick", "runs": {run.name: one for run, one in zip(wanted, found, strict=True)}})
    assert f"9 of {len(plan.arms) * 5} planned runs" in text
    assert (
        "| README | Lagged Lp-Reg has a higher pass@8 than GRPO | +0.100 (+0.100 to +0.100) | 4 | 0.125 | not shown"
        in text
    )
    assert len(re.findall(r"\| GRPO \| 5 |\| GRPO \| 0\.\d", text)) == 2, "in both tables of arms"
    assert "| Lp-Reg, lagged proxy | 4 |" in text and "further claims have no runs yet" in text


def test_noise_ends_responses_and_does_not_change_the_verdict() -> None:
    rng, numbers = random.Random(0), (3, 5, 7)
    texts = [long_tail.response(rng, numbers, 22).removesuffix(" <eos>") for _ in range(2000)]
    assert 0.37 < sum(long_tail.is_noise(text.split()[-1]) for text in texts) / len(texts) < 0.43
    assert 0.22 < sum(text.split()[-1] in ("hmm", "so") for text in texts) / len(texts) < 0.28
    assert 0.02 < sum("wait" in text for text in texts) / len(texts) < 0.08

    def score(text: str) -> float:
        return long_tail.verify(Sample(Prompt("", (), "", "3 5 7 > 22"), Response([], [], "stop", 0), text)).score

    right = "3 * 5 = 15 + 7 = 22 ok"
    assert [score(right), score(f"{right} n7"), score(f"{right} n7 n8"), score("n1 3 + 5 = 8 + 7 = 15 no")] == [
        1,
        1,
        0,
        0,
    ]


def test_the_long_tail_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_tail, "STEPS", 1)
    folder = tmp_path / "tail"
    long_tail.write(folder, 0)
    traces = (folder / "warm_start_c.parquet").read_bytes()
    assert json.loads((folder / "model/config.json").read_text())["vocab_size"] == 395
    long_tail.write(folder, 1)
    assert (folder / "warm_start_c.parquet").read_bytes() == traces
    assert [path.name for path in tmp_path.iterdir()] == ["tail"]


def test_half_push_halves_the_gradient_of_rare_negative_tokens() -> None:
    log_probs = torch.tensor([-5.0, -5.0, -0.1], requires_grad=True)
    selection = torch.tensor([True, True, False])
    advantages = torch.tensor([-2.0, 1.0, -1.0])
    loss = HalfPush(HalfPushSettings())
    output = loss(LossInputs(log_probs=log_probs, advantages=advantages, denominator=3, selection=selection))
    output.loss.backward()
    assert log_probs.grad is not None and log_probs.grad.tolist() == pytest.approx([1 / 3, -1 / 3, 1 / 3])
    assert output.metrics["selected_fraction"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (20, 2.086), (21, 2.0796), (34, 2.0322), (120, 1.9799)])
def test_the_intervals_are_those_of_students_t(freedom: int, t: float) -> None:
    assert t95(freedom) == pytest.approx(t, abs=5e-4)
