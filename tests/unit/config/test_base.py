"""A configuration that builds on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from tests.unit.config.conftest import MINIMAL


def write(**files: str) -> None:
    for name, text in files.items():
        path = Path(f"{name.replace('__', '/')}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(name: str, *overrides: str) -> Config:
    return load_config(Path(f"{name}.yaml"), list(overrides))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(common=MINIMAL)


def test_sections_are_merged_and_the_file_wins() -> None:
    write(mine="base: common.yaml\ntrain: {save_every: 5}\nrollout: {samples_per_prompt: 3}\n")
    config = read("mine", "rollout.prompts_per_step=6")
    assert (config.train.steps, config.train.save_every) == (10, 5)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (6, 3)
    assert config.run.name.startswith("mine-")


def test_a_base_is_relative_to_its_file_and_may_have_a_base() -> None:
    write(
        deep__middle="base: ../common.yaml\nseed: 1\ntrain: {save_every: 2}\n", deep__top="base: middle.yaml\nseed: 2"
    )
    config = read("deep/top")
    assert (config.seed, config.train.save_every, config.train.steps) == (2, 2, 10)


def test_lists_replace_and_null_clears() -> None:
    write(
        low="base: common.yaml\ntrain: {save_every: 7}\nactor: {optimizer: {betas: [0.8, 0.9]}}\n"
        "rollout: {stop_token_ids: [1, 2]}",
        high="base: low.yaml\ntrain: {save_every: null}\nrollout: {stop_token_ids: [3]}",
    )
    config = read("high")
    assert (config.train.save_every, config.rollout.stop_token_ids) == (0, [3])
    assert config.actor.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize("empty", ["{}", "null"])
def test_an_empty_mapping_clears_as_null_does(empty: str) -> None:
    """The rule holds for every mapping, and for overrides."""
    evaluation = "evaluation: {every: 3, suites: {a: a.jsonl}}\n"
    write(low="base: common.yaml\nactor: {optimizer: {lr: 0.5}}\n" + evaluation)
    write(suites=f"base: low.yaml\nevaluation: {{suites: {empty}}}\n", section=f"base: low.yaml\nevaluation: {empty}\n")
    write(optimizer=f"base: low.yaml\nactor: {{optimizer: {empty}}}\n")
    for config in (read("suites"), read("low", f"evaluation.suites={empty}")):
        assert config.evaluation.suites == {} and config.evaluation.every == 3
    for config in (read("section"), read("low", f"evaluation={empty}")):
        assert config.evaluation == read("common").evaluation
    for config in (read("optimizer"), read("low", f"actor.optimizer={empty}")):
        assert config.actor.optimizer == read("common").actor.optimizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: gone.yaml", "gone.yaml: no such configuration file (the base of mine.yaml)"),
        ("base: 3", "mine.yaml: base: 3 (a whole number) given; expected the path of another"),
        ("base: [a, b]", "(a list) given"),
        ("base: mine.yaml", "goes in a circle"),
        ("base: common.yaml\ntrain: {stepz: 1}", "mine.yaml: unknown key train.stepz; did you mean train.steps?"),
        ("base: common.yaml\ntrain: {steps: many}", "mine.yaml: train.steps: 'many' (text) given"),
    ],
)
def test_problems_of_a_base_name_the_file(text: str, words: str) -> None:
    write(mine=text)
    with pytest.raises(UserError) as caught:
        read("mine")
    assert words in str(caught.value)


def test_problems_name_the_file_that_set_the_value() -> None:
    write(common=MINIMAL + "actor: {tensor_parallel: x}\nalgoritm: {}\n", mine="base: common.yaml\nseed: 1")
    with pytest.raises(UserError, match=r"^common.yaml: unknown key algoritm"):
        read("mine")
    write(common=MINIMAL + "actor: {tensor_parallel: x}\n")
    with pytest.raises(UserError, match=r"^common.yaml: actor.tensor_parallel: 'x'"):
        read("mine")


def test_base_cannot_be_given_as_an_override() -> None:
    with pytest.raises(UserError, match="unknown key base"):
        read("common", "base=other.yaml")
