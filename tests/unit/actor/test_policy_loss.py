from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from lpreg.losses.registry import METHODS
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.method_sections import SECTIONS
from megatron_rl.config.methods import method_needs
from megatron_rl.errors import UserError


def settings_of(section: dict[str, Any]) -> Any:
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    return loss.settings


def beside(name: str) -> dict[str, Any]:
    """Settings of a method that are keys of `algorithm` itself."""
    return {"proxy_source": "old"} if name == "lp_reg" else {}


@pytest.mark.parametrize("name", METHODS)
def test_the_keys_of_a_methods_section_are_its_settings(name: str) -> None:
    known = {field.name for field in fields(METHODS[name].Settings)} - {"proxy_source"}
    assert set(SECTIONS[name].model_fields) == known
    assert all(field.default is None for field in SECTIONS[name].model_fields.values())


def test_every_method_has_its_own_section() -> None:
    assert set(SECTIONS) == set(METHODS) and set(METHODS) <= set(AlgorithmSettings.model_fields)
    assert len(set(SECTIONS.values())) == len(SECTIONS)


@pytest.mark.parametrize("name", METHODS)
def test_unset_keys_have_the_methods_defaults(name: str) -> None:
    assert settings_of({"name": name}) == METHODS[name].Settings(**beside(name))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_presets(name: str, preset: str) -> None:
    stated = METHODS[name].presets[preset]
    assert settings_of({"name": name, "preset": preset}) == METHODS[name].Settings(**stated | beside(name))
    key = next(iter(stated))
    overridden = settings_of({"name": name, "preset": preset, name: {key: 0.5}})
    assert overridden == METHODS[name].Settings(**stated | {key: 0.5} | beside(name))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", [None, "paper", "reference"])
def test_needs_without_torch_are_those_of_the_loss(name: str, preset: str | None) -> None:
    for more in ({}, {"reference_kl": {"coefficient": 0.1}}, {"correction": {"reject_sequences": True}}):
        algorithm = AlgorithmSettings.model_validate({"name": name, "preset": preset, **more})
        loss = LossChoice.of(algorithm).make()
        assert method_needs(algorithm) == loss.needs
        assert loss.acts_without_advantage == (name in ("kl_cov", "entropy_bonus", "tre") or "reference_kl" in more)
        assert not (loss.token_separable and "correction" in more)


def test_the_word_none_is_none() -> None:
    assert METHODS["lp_reg"].presets["reference"]["k3_clamp"] == 10.0
    assert settings_of({"preset": "reference", "lp_reg": {"k3_clamp": "none"}}).k3_clamp is None
    assert settings_of({"preset": "reference"}).k3_clamp == 10.0
    assert settings_of({"preset": "paper", "lp_reg": {"k3_clamp": 3.0}}).k3_clamp == 3.0


def test_a_reference_kl_wraps_the_method() -> None:
    section = {"name": "gspo", "reference_kl": {"coefficient": 0.25, "estimator": "k1"}}
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    assert (loss.settings.coefficient, loss.settings.estimator) == (0.25, "k1")
    assert loss.loss.name == "gspo" and loss.denominator_counts == "sequences"


def test_a_correction_wraps_method_and_reference_kl() -> None:
    correction = {"weights": "masked", "low": 0.25, "high": 3.0, "reject_sequences": True}
    section = {"name": "gspo", "reference_kl": {"coefficient": 0.25}, "correction": correction}
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    assert {name: getattr(loss.settings, name) for name in correction} == correction
    assert loss.settings.sequence_low == 0.99
    assert (loss.loss.name, loss.loss.loss.name) == ("reference_kl", "gspo")


def test_every_key_reaches_the_loss() -> None:
    given = {
        "rho": 0.5,
        "beta": 0.0,
        "min_p": 0.3,
        "fixed_tau": 0.25,
        "kl_estimator": "k3",
        "select_by": "log_prob",
        "advantage_sign": "negative",
        "selection_scope": "micro_batch_negatives",
        "require_below_proxy": False,
        "k3_clamp": 2.0,
        "clip_low": 0.0,
        "clip_high": 0.0,
        "clip_negative_upper": False,
    }
    assert set(given) == set(SECTIONS["lp_reg"].model_fields)
    del given["min_p"]  # replaced by fixed_tau
    settings = settings_of({"lp_reg": given, "proxy_source": "lagged"})
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.proxy_source == "lagged"


def test_settings_that_the_method_refuses_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"algorithm\.clip_cov\.cov_high must lie in \(1, inf\), got 0\.5"):
        settings_of({"name": "clip_cov", "clip_cov": {"cov_high": 0.5}})


def test_the_section_of_another_method_is_not_read() -> None:
    assert settings_of({"name": "grpo", "lp_reg": {"clip_high": 5.0}, "grpo": {"clip_low": 0.1}}).clip_high == 0.2
