"""The registry, the presets and the checks on settings and inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpreg import LossInputs, Mean, SelectionRule, losses, make_loss
from lpreg.losses.registry import METHODS
from lpreg.losses.settings import settings_of


@pytest.mark.parametrize("name", METHODS)
def test_both_presets_of_every_method_build(name: str) -> None:
    presets = METHODS[name].presets
    assert set(presets) == {"paper", "reference"}
    for preset, settings in presets.items():
        loss = make_loss.preset(name, preset)
        assert loss.name == name
        assert {setting: getattr(loss.settings, setting) for setting in settings} == settings


def test_methods_are_found_by_file() -> None:
    files = {path.stem for path in Path(losses.__file__).parent.glob("*.py")}
    others = {"__init__", "base", "inputs", "lp_reg_term", "ppo", "registry", "settings"}
    wrappers = {"corrected", "rarity", "reference_kl", "with_lp_reg"}
    assert set(METHODS) == files - others - wrappers


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_documented(name: str) -> None:
    settings = settings_of(METHODS[name].Settings)
    assert [setting.name for setting in settings if not setting.doc] == []
    assert METHODS[name].Settings.__doc__ and not METHODS[name].Settings.__doc__.startswith(name)


def test_methods_and_their_needs_are_read_without_torch() -> None:
    program = """
import sys
from lpreg.losses.registry import METHODS
from lpreg.losses.settings import settings_of
from lpreg.losses.settings import settings_of
for method in METHODS.values():
    for preset in ({}, *method.presets.values()):
        method.Settings(**preset).needs
    settings_of(method.Settings)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_kl_cov_has_the_share_of_the_published_code() -> None:
    for loss in (make_loss("kl_cov"), make_loss.preset("kl_cov", "paper"), make_loss.preset("kl_cov", "reference")):
        assert (loss.settings.share, loss.settings.beta) == (2e-3, 1.0)
    assert make_loss.preset("kl_cov", "paper", share=2e-4).settings.share == 2e-4


def test_the_bounds_of_dppo_do_not_follow_its_divergence() -> None:
    """docs/methods.md says so, under what differs from published code."""
    for loss in (make_loss("dppo", divergence="kl"), make_loss.preset("dppo", "paper", divergence="kl")):
        assert (loss.settings.bound_low, loss.settings.bound_high) == (0.2, 0.2)


def test_overrides_win_over_the_preset() -> None:
    loss = make_loss.preset("lp_reg", "reference", rho=0.05, proxy_source="lagged")
    assert loss.settings.rho == 0.05 and loss.settings.k3_clamp == 10.0
    assert loss.proxy_source == "lagged"


def test_needs_of_the_methods() -> None:
    paper = make_loss.preset("lp_reg", "paper")
    assert paper.proxy_source == "current"
    assert paper.token_stats_kwargs() == {"min_p": 0.02}
    reference = make_loss.preset("lp_reg", "reference", fixed_tau=0.02)
    assert reference.selection is None and reference.token_stats_kwargs() == {"fixed_tau": 0.02}
    grpo = make_loss("grpo")
    assert grpo.proxy_source is None and grpo.token_stats_kwargs() == {}
    assert grpo.selection is None and grpo.denominator_counts == "tokens" and not grpo.acts_without_advantage
    assert paper.selection == SelectionRule(kind="lowest_log_prob", fraction=0.01)
    assert make_loss("entropy_bonus").token_stats_kwargs() == {"entropy": "grad"}
    assert make_loss("gspo").denominator_counts == "sequences"
    high_entropy = make_loss("high_entropy")
    assert high_entropy.denominator_counts == "selected_tokens" and high_entropy.selection.needs_entropy
    assert paper.token_separable and grpo.token_separable and high_entropy.token_separable
    assert not reference.token_separable and not make_loss("gspo").token_separable


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        make_loss("grpo").settings.clip_low = 0.3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lpreg", {}, "'lpreg' is not a method; did you mean 'lp_reg'"),
        ("xyz", {}, "'xyz' is not a method; known: cispo, clip_cov"),
        ("lp_reg", {"betta": 1}, "'betta' is not a setting of lp_reg; did you mean 'beta'"),
        ("grpo", {"rho": 0.1}, "'rho' is not a setting of grpo; known: clip_low, clip_high"),
        ("lp_reg", {"rho": 0.0}, r"rho must lie in \(0, 1\]"),
        ("lp_reg", {"rho": "0.1"}, "rho must be a number"),
        ("lp_reg", {"beta": -1.0}, "beta"),
        ("lp_reg", {"beta": float("nan")}, "beta"),
        ("lp_reg", {"min_p": 2.0}, "min_p"),
        ("lp_reg", {"fixed_tau": 0.0}, "fixed_tau"),
        ("lp_reg", {"k3_clamp": 0.0}, "k3_clamp"),
        ("lp_reg", {"clip_low": 1.5}, "clip_low"),
        ("grpo", {"aggregation": "mean"}, "aggregation must be one of token_mean"),
        (
            "grpo",
            {"aggregation": "constant_length"},
            "constant_length must be given with aggregation='constant_length'",
        ),
        ("clip_higher", {"constant_length": 8}, "constant_length must be given with"),
        ("grpo", {"aggregation": "constant_length", "constant_length": 0}, r"constant_length must lie in \[1, inf\)"),
        ("clip_higher", {"clip_high": -1.0}, "clip_high"),
        ("entropy_bonus", {"coefficient": float("inf")}, r"coefficient must lie in \[0, inf\), got inf"),
        ("sapo", {"tau_positive": float("inf")}, "tau_positive"),
        ("vespo", {"power_positive": float("inf")}, "power_positive"),
        ("dual_clip", {"clip_dual": 1.0}, r"clip_dual must lie in \(1, inf\)"),
        ("gspo", {"clip_low": 2.0}, "clip_low"),
        ("kl_cov", {"share": 0.0}, "share"),
        ("kl_cov", {"beta": -1.0}, "beta"),
        ("clip_cov", {"share": 1.5}, "share"),
        ("clip_cov", {"cov_low": 5.0}, r"cov_high must lie in \(5, inf\)"),
        ("high_entropy", {"share": 2}, "share"),
        ("entropy_bonus", {"coefficient": -0.1}, "coefficient"),
        ("lp_reg", {"kl_estimator": "k2"}, "kl_estimator must be one of k3, full"),
        ("lp_reg", {"selection_scope": "all"}, "selection_scope must be one of"),
        ("lp_reg", {"proxy_source": "new"}, "proxy_source must be one of"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(name, **settings)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="'papers' is not a preset of grpo; did you mean 'paper'"):
        make_loss.preset("grpo", "papers")
    with pytest.raises(ValueError, match="is not a method"):
        make_loss.preset("groo", "paper")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages has shape \[2\], but log_probs has \[3\]"),
        ({"in_filter": torch.zeros(3)}, "in_filter must be bool"),
        ({"denominator": 0}, "denominator"),
    ],
)
def test_bad_inputs_are_named(change: dict, message: str) -> None:
    arguments = {"log_probs": torch.zeros(3), "advantages": torch.zeros(3), "denominator": 3} | change
    with pytest.raises(ValueError, match=message):
        LossInputs(**arguments)


@pytest.mark.parametrize(
    ("settings", "given", "missing"),
    [
        ({}, (), "log_z"),
        ({}, ("log_z",), "in_filter"),
        ({}, ("log_z", "in_filter"), "selection"),
        ({"proxy_source": "lagged"}, ("log_z", "in_filter", "selection"), "proxy_log_probs"),
        ({"proxy_source": "old"}, ("log_z", "in_filter", "selection", "old_log_probs"), "old_log_z"),
        (
            {"proxy_source": "old", "kl_estimator": "full"},
            ("log_z", "in_filter", "selection", "old_log_probs", "old_log_z", "old_in_filter"),
            "proxy_kl",
        ),
        ({"proxy_source": "lagged", "kl_estimator": "full"}, ("selection", "proxy_log_probs"), "proxy_kl"),
        ({"proxy_source": "old"}, ("log_z", "in_filter", "selection", "old_log_probs", "old_log_z"), "old_in_filter"),
    ],
)
def test_a_missing_input_is_named(settings: dict, given: tuple[str, ...], missing: str) -> None:
    flags = {"in_filter", "old_in_filter", "selection"}
    fields = {name: torch.zeros(3, dtype=torch.bool if name in flags else torch.float32) for name in given}
    inputs = LossInputs(log_probs=torch.zeros(3), advantages=torch.zeros(3), denominator=3, **fields)
    with pytest.raises(ValueError, match=rf"lp_reg needs LossInputs\.{missing}$"):
        make_loss("lp_reg", **settings)(inputs)


def test_means_add_up() -> None:
    both = Mean(torch.tensor(3.0), torch.tensor(2)) + Mean(torch.tensor(1.0), torch.tensor(6))
    assert both.value == 0.5
    assert Mean(torch.tensor(0.0), torch.tensor(0)).value != Mean(torch.tensor(0.0), torch.tensor(0)).value  # NaN
