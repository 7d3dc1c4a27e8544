"""Settings that do nothing: a warning if a file has them, an error if an override does."""

from __future__ import annotations

import pytest

from megatron_rl.config.remarks import remarks
from megatron_rl.errors import UserError

from .conftest import MINIMAL


def test_a_configuration_without_needless_settings_has_no_remark(load) -> None:
    assert remarks(load("algorithm.lp_reg.rho=0.1")) == []
    assert remarks(load("evaluation={suites: {s: s.jsonl}, samples_per_prompt: 1, temperature: 0.0}")) == []


def test_settings_of_another_method_in_the_file_are_remarked(load) -> None:
    config = load("algorithm.name=grpo", text=MINIMAL + "algorithm: {lp_reg: {rho: 0.1}}\n")
    assert remarks(config) == [
        "file example.yaml: algorithm.lp_reg.rho has no effect: it is a setting of lp_reg, and algorithm.name is grpo"
    ]


def test_settings_of_another_method_as_an_override_are_an_error(load) -> None:
    with pytest.raises(UserError, match=r"override: algorithm\.grpo\.clip_low has no effect: it is a setting of grpo"):
        load("algorithm.grpo.clip_low=0.1")


def test_several_greedy_samples_are_remarked(load) -> None:
    suites = (
        "{greedy: {data: a.jsonl, temperature: 0.0}, one: {data: a.jsonl, temperature: 0.0, samples_per_prompt: 1}}"
    )
    (remark,) = remarks(load(f"evaluation.suites={suites}"))
    assert remark.startswith(
        "evaluation.suites.greedy: 8 samples per problem at temperature 0 are the same text 8 times"
    )
