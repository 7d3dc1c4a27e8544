"""Warnings about a method read metrics that its loss reports, and advise keys that its configuration has."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lpreg import LossInputs, make_loss, with_lp_reg
from lpreg.losses.registry import METHODS
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.keys import is_known
from megatron_rl.config.methods import lp_reg_term, method_problems
from megatron_rl.config.observability import DiagnosisSettings
from megatron_rl.observability.diagnosis import Diagnosis, rules_of
from megatron_rl.observability.method_rules import SELECTED, filters, selections
from megatron_rl.training.metrics import loss_metrics

KEY = re.compile(r"\b(?:algorithm|actor|rollout|reward|data|train|evaluation)(?:\.\w+)+")
SELECTING = ("kl_cov", "clip_cov", "high_entropy", "stapo")
TERMS: list[dict[str, Any]] = [
    {},
    {"kl_estimator": "full"},
    {"fixed_tau": 0.01},
    {"require_below_proxy": True},
    {"min_p": 0.0},
    {"select_by": "all"},
]


def algorithm(name: str, **others: Any) -> AlgorithmSettings:
    return AlgorithmSettings.model_validate({"name": name, **others})


def configurations() -> list[AlgorithmSettings]:
    found = [algorithm(name) for name in METHODS]
    found += [algorithm("lp_reg", lp_reg=term) for term in TERMS]
    found += [algorithm("tre", tre={"region": region}) for region in ("top_k", "top_p", "min_p")]
    found += [algorithm(name, with_lp_reg=term) for name in METHODS if name != "lp_reg" for term in TERMS]
    return [settings for settings in found if not method_problems(settings)]


def shown(settings: AlgorithmSettings) -> str:
    return " ".join(map(str, settings.model_dump(exclude_defaults=True).items()))[:80]


@pytest.mark.parametrize("settings", configurations(), ids=shown)
def test_every_key_in_a_remedy_is_known_and_of_this_method(settings: AlgorithmSettings) -> None:
    keys = [tuple(key.split(".")) for rule in rules_of(settings) for key in KEY.findall(rule.remedy)]
    assert [key for key in keys if not is_known(key)] == []
    sections = {key[1] for key in keys if key[0] == "algorithm"}
    assert sections & {*METHODS, "with_lp_reg"} <= {settings.name, "with_lp_reg"}


def test_words_of_remedies_are_no_bare_keys() -> None:
    """A key without its section, such as kappa, would not be found in the configuration."""
    bare = re.compile(r"\b(rho|beta|kappa|min_p|fixed_tau|share|lr|tau)\b")
    for settings in configurations():
        for rule in rules_of(settings):
            assert bare.findall(KEY.sub("", rule.remedy)) == [], rule.remedy


def reported(settings: AlgorithmSettings) -> set[str]:
    """The metrics that the method's own loss gives, on a few tokens."""
    loss = make_loss(settings.name)
    if (term := lp_reg_term(settings)) is not None:
        loss = with_lp_reg(loss, **asdict(term))
    tokens = 6
    numbers = torch.linspace(-2, -0.1, tokens, requires_grad=True)
    entropy = torch.ones(tokens) * numbers.detach().abs() + 0 * numbers
    output = loss(
        LossInputs(
            log_probs=numbers,
            entropy=entropy,
            log_z=torch.full((tokens,), -0.1) + 0 * numbers,
            in_filter=torch.ones(tokens, dtype=torch.bool),
            filter_entropy=entropy,
            filter_extent=torch.ones(tokens),
            advantages=torch.tensor([1.0, -1, 1, -1, 1, -1]),
            selection=torch.ones(tokens, dtype=torch.bool),
            sequence_ids=torch.arange(tokens) // 2,
            denominator=float(tokens),
        )
    )
    parts = {name: (1.0, 1.0) for name in output.metrics}
    return {*loss_metrics(parts, tokens), "lpreg/kept_fraction"}


WATCHED = [settings for settings in configurations() if selections(settings) or filters(settings)]


@pytest.mark.parametrize("settings", WATCHED, ids=shown)
def test_watched_metrics_are_those_that_the_loss_reports(settings: AlgorithmSettings) -> None:
    watched = {part.metric for part in (*selections(settings), *filters(settings))}
    assert watched <= reported(settings)


@pytest.mark.parametrize("name", [*SELECTING, "tre", "lp_reg"])
def test_a_method_without_effect_is_noticed(name: str, tmp_path: Path) -> None:
    settings = algorithm(name)
    (part,) = selections(settings)
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=3), settings, [])
    found = [diagnosis.step(step, {part.metric: 0.0, "reward/mean": 1.0}) for step in range(1, 6)]
    assert [finding.name for step in found for finding in step] == ["nothing_selected"]
    (finding,) = found[2]
    assert f"algorithm.{name}." in finding.remedy and part.metric in finding.what


@pytest.mark.parametrize("name", ["dppo", "grpo", "gspo"])
def test_a_term_without_effect_is_noticed_under_its_own_keys(name: str, tmp_path: Path) -> None:
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=2), algorithm(name, with_lp_reg={}), [])
    found = [f for step in (1, 2) for f in diagnosis.step(step, {SELECTED: 0.0, "lpreg/kept_fraction": 1.0})]
    assert {finding.name for finding in found} == {"nothing_selected", "everything_kept"}
    assert all("algorithm.with_lp_reg." in f.remedy and "algorithm.lp_reg" not in f.remedy for f in found)


def test_the_two_selections_of_a_method_with_the_term_are_told_apart(tmp_path: Path) -> None:
    settings = algorithm("kl_cov", with_lp_reg={"select_by": "all"})
    diagnosis = Diagnosis(tmp_path, DiagnosisSettings(window=2), settings, [])
    metrics = {SELECTED: 0.002, "lpreg/lp_reg_selected_fraction": 0.0}
    found = [finding for step in (1, 2, 3) for finding in diagnosis.step(step, metrics)]
    assert len(found) == 1 and "with_lp_reg" in found[0].remedy and "kl_cov" not in found[0].remedy


def test_a_filter_that_keeps_everything_on_purpose_gets_no_warning() -> None:
    assert filters(algorithm("lp_reg", proxy_source="lagged", lp_reg={"min_p": 0.0})) == []
