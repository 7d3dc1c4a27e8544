from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from lpreg.losses.registry import METHODS
from lpreg.presets import PRESETS
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.fields import Section
from megatron_rl.config.methods import LpRegSettings
from megatron_rl.errors import UserError

SECTIONS: dict[str, type[Section]] = {
    name: type(field.default) for name, field in AlgorithmSettings.model_fields.items() if name in METHODS
}


def settings_of(section: dict[str, Any]) -> Any:
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    return loss.settings


@pytest.mark.parametrize("name", SECTIONS)
def test_a_methods_keys_are_its_settings(name: str) -> None:
    known = {field.name for field in fields(METHODS[name].Settings)} - {"proxy_source"}
    assert set(SECTIONS[name].model_fields) == known
    assert all(field.default is None for field in SECTIONS[name].model_fields.values())


def test_every_method_has_a_section() -> None:
    names = get_args(AlgorithmSettings.model_fields["name"].annotation)
    assert set(SECTIONS) == set(METHODS) == set(PRESETS) == set(names)
    assert len(set(SECTIONS.values())) == len(SECTIONS), "each its own"
    sections = {name for name, field in AlgorithmSettings.model_fields.items() if isinstance(field.default, Section)}
    assert sections - {"overlong", "correction", "reference_kl"} == set(METHODS)


@pytest.mark.parametrize("name", SECTIONS)
def test_unset_keys_leave_the_methods_defaults(name: str) -> None:
    assert LossChoice.of(AlgorithmSettings.model_validate({"name": name})).settings in ({}, {"proxy_source": "old"})
    of_lp_reg = {"proxy_source": "old"} if name == "lp_reg" else {}
    assert settings_of({"name": name}) == METHODS[name].Settings(**of_lp_reg)


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_presets(name: str, preset: str) -> None:
    of_lp_reg = {"proxy_source": "old"} if name == "lp_reg" else {}
    assert settings_of({"name": name, "preset": preset}) == METHODS[name].Settings(**PRESETS[name][preset], **of_lp_reg)
    key = next(iter(PRESETS[name][preset]))
    overridden = settings_of({"name": name, "preset": preset, name: {key: 0.5}})
    assert overridden == METHODS[name].Settings(**PRESETS[name][preset] | {key: 0.5}, **of_lp_reg)


def test_none_in_words_is_none() -> None:
    assert PRESETS["lp_reg"]["reference"]["k3_clamp"] == 10.0
    assert settings_of({"preset": "reference", "lp_reg": {"k3_clamp": "none"}}).k3_clamp is None
    assert settings_of({"preset": "reference"}).k3_clamp == 10.0
    assert settings_of({"preset": "paper", "lp_reg": {"k3_clamp": 3.0}}).k3_clamp == 3.0


def test_a_reference_model_goes_with_the_method() -> None:
    section = {"name": "gspo", "reference_kl": {"coefficient": 0.25, "estimator": "k1"}}
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    assert (loss.settings.coefficient, loss.settings.estimator) == (0.25, "k1")
    assert loss.loss.name == "gspo" and loss.denominator_counts == "sequences"


def test_a_correction_goes_around_it_all() -> None:
    correction = {"weights": "masked", "low": 0.25, "high": 3.0, "reject_sequences": True}
    section = {"name": "gspo", "reference_kl": {"coefficient": 0.25}, "correction": correction}
    loss: Any = LossChoice.of(AlgorithmSettings.model_validate(section)).make()
    assert {name: getattr(loss.settings, name) for name in correction} == correction
    assert loss.settings.sequence_low == 0.99
    assert (loss.loss.name, loss.loss.loss.name) == ("reference_kl", "gspo")


def test_every_key_arrives() -> None:
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
    assert set(given) == set(LpRegSettings.model_fields)
    settings = settings_of({"lp_reg": given, "proxy_source": "lagged"})
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.proxy_source == "lagged"


def test_what_the_method_refuses_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"algorithm\.clip_cov: cov_high must lie in \(1, inf\], got 0\.5"):
        settings_of({"name": "clip_cov", "clip_cov": {"cov_high": 0.5}})


def test_the_other_methods_section_is_not_read() -> None:
    assert settings_of({"name": "grpo", "lp_reg": {"clip_high": 5.0}, "grpo": {"clip_low": 0.1}}).clip_high == 0.2
