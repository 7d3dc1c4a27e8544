"""The parts of docs/extending.md, as a package outside the repository: each can be configured and does what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lpreg import LossInputs
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config import Config, check_inputs, load_config
from megatron_rl.errors import UserError
from megatron_rl.reward.pool import RewardPool
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import engine_kind
from megatron_rl.rollout.group_filter import group_filter_of
from megatron_rl.training.advantages import advantages_of
from megatron_rl.types import Prompt, Response, RewardResult, Sample, SamplingParams
from megatron_rl.utils.import_path import import_object
from tests.hf_models import write_hf_model

PAGE = Path(__file__).parents[2] / "docs/extending.md"
QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/countdown.yaml"


def write_package(folder: Path) -> Path:
    """Writes the page's five files and its configuration, which builds on the quickstart's."""
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r'```python title="(\S+)"\n(.*?)```', text, flags=re.S)
    assert len(files) == 5
    for name, source in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    config = folder / "own.yaml"
    config.write_text(f"base: {QUICKSTART}\n" + text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    return config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = write_package(tmp_path)
    monkeypatch.chdir(tmp_path)  # a run finds modules in the folder in which it starts
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        monkeypatch.delitem(sys.modules, name)
    return load_config(path, [])


def test_the_loss_has_the_gradient_that_it_states(config: Config) -> None:
    loss = LossChoice.of(config.algorithm).make()
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs, old_log_probs=torch.tensor([-1.5, -2.0]), advantages=torch.ones(2), denominator=2
    )
    loss(inputs).loss.backward()
    ratio, log_ratio = torch.tensor([0.5, 0.0]).exp(), torch.tensor([0.5, 0.0])
    assert torch.allclose(log_probs.grad, (-ratio + 2 * 0.5 * log_ratio) / 2)  # type: ignore[arg-type]


def test_the_advantage_marks_the_best_of_each_group(config: Config) -> None:
    rewards, groups = np.array([1.0, 0.0, 0.5, 0.5]), np.array([7, 7, 9, 9])
    assert advantages_of(config.algorithm, rewards, groups).tolist() == [1, 0, 1, 1]


def test_the_reward_runs_in_the_pool(config: Config) -> None:
    prompt, response = Prompt("p", (1,), "?", None), Response([1], [0.0], "stop", 0)
    with RewardPool(config.reward.model_copy(update={"workers": 1})) as pool:
        results = pool.score([Sample(prompt, response, text) for text in ("4 + 5 ok ", "4 + 5 no")])
    assert [(result.score, result.answer) for result in results] == [(1.0, "k "), (0.0, "no")]


def test_the_group_filter_decides_on_graded_groups(config: Config) -> None:
    keeps = group_filter_of(config.rollout)
    assert keeps is not None

    def group(*scores: float) -> Group:
        return Group(0, 0, Prompt("p", (1,), "", None), 0, (), tuple(RewardResult(score) for score in scores))

    assert [keeps(group(*scores)) for scores in ((1, 0), (1, 1), (0, 0))] == [True, False, False]


def test_the_engine_answers(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = engine_kind(config.rollout.engine)
    write_hf_model(tmp_path / "model", "qwen3")
    make: Callable[[EngineLaunch], Any] = import_object(kind.engine, "rollout.engine")
    launch = EngineLaunch(kind=kind, model_folder=tmp_path / "model", device="cpu", dtype="float32", max_tokens=32)
    sampling = SamplingParams(n=2, max_tokens=3, temperature=1.0, stop_token_ids=(), seed=0)
    groups = make(launch).generate([(1, 2), (3,)], sampling)
    assert [len(response) for group in groups for response in group] == [3] * 4
    assert "2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.name=mylab.loss:Absent",
        "algorithm.advantage=mylab.absent:f",
        "reward.name=mylab.reward:absent",
        "rollout.group_filter=mylab.groups:absent",
        "rollout.engine=mylab.engine:logged_engine",
    ],
)
def test_a_path_that_names_nothing_usable_is_an_error_before_the_run(config: Config, override: str) -> None:
    with pytest.raises(UserError, match=re.escape(override.split("=")[0])):
        check_inputs(load_config(Path("own.yaml"), [override]), prepared=False, weights=False)


def test_the_page_s_configuration_is_all_there_is(config: Config) -> None:
    own = yaml.safe_load(PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    assert own["algorithm"]["settings"] == {"strength": 0.5} and config.algorithm.settings == {"strength": 0.5}
