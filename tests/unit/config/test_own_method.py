"""A loss and an advantage of the user's own, named by their import paths."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lpreg import LossInputs
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config import check_inputs, effective, expand
from megatron_rl.config.methods import method_needs, method_settings
from megatron_rl.config.passes import passes_of
from megatron_rl.errors import UserError

from .conftest import MINIMAL

OWN = """\
from dataclasses import dataclass, field

import torch

from lpreg import LossOutput, Mean, MethodNeeds, MethodSettings, PolicyLoss
from lpreg.losses.settings import Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(MethodSettings):
    scale: Positive = 2.0
    bound: Positive | None = 5.0

    @property
    def needs(self):
        return MethodNeeds(acts_without_advantage=True)


class Scaled(PolicyLoss):
    name = "scaled"
    Settings = Settings
    presets = {"strong": {"scale": 8.0}}

    def __call__(self, inputs):
        losses = -self.settings.scale * inputs.advantages * inputs.log_probs
        return LossOutput(self.aggregate(losses, inputs), {"ratio": Mean.of(inputs.ratio, inputs.counted)})


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherSettings(MethodSettings):
    words: list[str] = field(default_factory=lambda: ["wait"])
    label: str = None


class Failing(Scaled):
    Settings = OtherSettings
    presets = {"unlabelled": {"label": 3}}

    def __call__(self, inputs):
        self.need(inputs.entropy, "entropy")


def function(inputs):
    pass


class WithoutSettings(PolicyLoss):
    name = "bare"
"""
NUMBER = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working folder, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_method_{next(NUMBER)}"
    Path(f"{name}.py").write_text(OWN)
    return name


def test_a_loss_by_import_path(load, module):
    config = load(f"algorithm.name={module}:Scaled", "algorithm.settings={bound: none}", "algorithm.preset=strong")
    assert module not in sys.modules, "loading a configuration imports nothing of the user's"
    loss = LossChoice.of(config.algorithm).make()
    assert (loss.settings.scale, loss.settings.bound) == (8.0, None)
    assert method_needs(config.algorithm).acts_without_advantage
    output = loss(LossInputs(log_probs=torch.tensor([-1.0, -2.0]), advantages=torch.ones(2), denominator=2))
    assert float(output.loss) == 12.0


def test_effective_settings_of_an_own_loss_are_shown(load, module):
    config = load(f"algorithm.name={module}:Scaled", "algorithm.settings={bound: 3}", "algorithm.preset=strong")
    found = {item.key: (item.value, item.source) for item in effective(config)}
    assert found["algorithm.settings.scale"] == (8.0, "preset strong")
    assert found["algorithm.settings.bound"] == (3, "override")
    unknown = load("algorithm.name=no_such_module:Scaled", "algorithm.settings={bound: 3}")
    assert yaml.safe_load(expand(unknown))["algorithm"]["settings"] == {"bound": 3}


def test_another_process_makes_the_loss_from_the_choice(load, module):
    """A rank gets only the choice, and runs in the working folder."""
    import pickle

    config = load(f"algorithm.name={module}:Scaled")
    Path("choice.pkl").write_bytes(pickle.dumps(LossChoice.of(config.algorithm)))
    program = "import pickle; print(pickle.load(open('choice.pkl', 'rb')).make().settings.scale)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        check=False,
    )
    assert done.stdout.strip() == "2.0", done.stderr


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("{m}:Scald", [], "has no 'Scald'"),
        ("no_such_module:Scaled", [], "cannot be imported: ModuleNotFoundError"),
        ("{m}:function", [], "a subclass of lpreg.PolicyLoss is expected"),
        ("{m}:WithoutSettings", [], "WithoutSettings.Settings must be a dataclass with the base lpreg.MethodSettings"),
        ("{m}:Scaled", ["algorithm.settings={scal: 1.0}"], "unknown key algorithm.settings.scal: .* mean 'scale'"),
        ("{m}:Scaled", ["algorithm.settings={scale: -1.0}"], r"algorithm.settings.scale must lie in \(0, inf\), got"),
        ("{m}:Scaled", ["algorithm.settings={scale: big}"], "algorithm.settings.scale must be a number, got 'big'"),
        ("{m}:Failing", ["algorithm.settings={label: 3}"], "algorithm.settings.label must be text, got 3"),
        ("{m}:Failing", ["algorithm.preset=unlabelled"], "algorithm.settings.label must be text, got 3"),
        ("{m}:Scaled", ["algorithm.preset=weak"], "algorithm.preset: 'weak' given; presets of .*: strong"),
    ],
)
def test_problems_of_a_loss_by_import_path(load, module, path, more, words):
    config = load(f"algorithm.name={path.format(m=module)}", *more)
    with pytest.raises(UserError, match=words):
        method_settings(config.algorithm)
    with pytest.raises(UserError, match=words):
        check_inputs(config, prepared=False, weights=False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.name=lpreg", "did you mean lp_reg?"),
        ("algorithm.name=my module:f", "or package.module:Class"),
        ("algorithm.advantage=rlo", "did you mean rloo?"),
        (
            "algorithm.advantage=3",
            "expected one of grpo, dr_grpo, rloo, maxrl, reinforce_plus_plus, or package.module:function",
        ),
    ],
)
def test_a_name_that_is_neither_known_nor_an_import_path(load, override, words):
    with pytest.raises(UserError) as caught:
        load(override)
    assert str(caught.value).startswith(f"override {override}: ") and words in str(caught.value)


def test_an_advantage_by_import_path_may_have_groups_of_one(load):
    assert load("algorithm.advantage=mine:advantages", "rollout.samples_per_prompt=1", text=MINIMAL).algorithm


def test_an_error_of_an_own_loss_names_the_setting_and_the_line(load, module):
    loss = LossChoice.of(load(f"algorithm.name={module}:Failing").algorithm).make()
    inputs = LossInputs(log_probs=torch.zeros(2), advantages=torch.ones(2), denominator=2)
    words = rf"algorithm\.name='{module}:Failing': ValueError in .*{module}\.py, line \d+: scaled needs .*entropy"
    with pytest.raises(UserError, match=words):
        loss(inputs)


def test_the_passes_of_an_own_loss_are_known(load, module):
    assert str(passes_of(load(f"algorithm.name={module}:Scaled"))).startswith("forwards without gradient: ")


def test_default_factories_and_none_as_a_default(load, module):
    config = load(f"algorithm.name={module}:Failing")
    settings = LossChoice.of(config.algorithm).make().settings
    assert (settings.words, settings.label) == (["wait"], None)
    assert yaml.safe_load(expand(config))["algorithm"]["settings"] == {"words": ["wait"], "label": "none"}
    given = load(f"algorithm.name={module}:Failing", "algorithm.settings={label: mine, words: [so]}")
    assert LossChoice.of(given.algorithm).make().settings.label == "mine"
