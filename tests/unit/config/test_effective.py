"""Effective values and their sources: in config.yaml, as data, and in the diff of a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rl.config import Config, effective, expand, load_config, read_effective
from megatron_rl.config.effective import read_expanded

FILES = {
    "base.yaml": """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10, save_every: 5}
evaluation: {every: 5, suites: {a: a.jsonl, b: {data: b.jsonl}}}
algorithm: {preset: reference, lp_reg: {rho: 0.2, beta: 3.0}}
""",
    "mine.yaml": """\
base: base.yaml
run: {name: mine}
train: {steps: 20, save_every: null}
algorithm: {lp_reg: {beta: null, k3_clamp: none}}
""",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    return load_config(Path("mine.yaml"), ["seed=3", "seed=4", "actor.optimizer={lr: 1e-3}", "evaluation.every=null"])


def test_every_value_has_its_source(config):
    found = {item.key: (item.value, item.source) for item in effective(config)}
    expected = {
        "seed": (4, "override"),
        "run.name": ("mine", "file mine.yaml"),
        "run.folder": ("runs/mine", "default"),
        "train.steps": (20, "file mine.yaml"),
        "train.save_every": (0, "default"),  # cleared by a null
        "evaluation.every": (0, "default"),
        "evaluation.suites.a.data": ("a.jsonl", "file base.yaml"),
        "evaluation.suites.b.data": ("b.jsonl", "file base.yaml"),
        "evaluation.suites.b.temperature": (None, "default"),
        "actor.optimizer.lr": (1e-3, "override"),
        "actor.optimizer.weight_decay": (config.actor.optimizer.weight_decay, "default"),
        "algorithm.preset": ("reference", "file base.yaml"),
        "algorithm.lp_reg.rho": (0.2, "file base.yaml"),
        "algorithm.lp_reg.beta": (1.0, "preset reference"),
        "algorithm.lp_reg.selection_scope": ("micro_batch_negatives", "preset reference"),
        "algorithm.lp_reg.k3_clamp": ("none", "file mine.yaml"),
        "algorithm.lp_reg.fixed_tau": ("none", "default"),
    }
    assert {key: found[key] for key in expected} == expected


def test_the_yaml_text_carries_the_sources_and_no_method_setting_is_null(config):
    text = expand(config)
    assert "\n    beta: 1.0  # preset reference\n" in text and "\nseed: 4  # override\n" in text
    assert yaml.safe_load(text) == config.model_dump(mode="json")
    assert None not in config.algorithm.lp_reg.model_dump().values()
    assert read_effective(text) == effective(config)


def test_an_expanded_file_loads_to_an_equal_configuration(config):
    Path("again.yaml").write_text(expand(config))
    again = load_config(Path("again.yaml"), [])
    assert again == config
    assert again.sources["algorithm.lp_reg.beta"] == "file again.yaml"
    assert again.sources != {} and again.sources == config.sources, "sources are no part of a comparison"


def test_a_comment_never_becomes_part_of_a_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FILES["base.yaml"])
    awkward = ["# not a comment", "a: # b", "two\nlines", "x" * 300 + " y # z", "'", "é  # ü"]
    overrides = [f"evaluation.suites.s{n}={{data: {name!r}}}" for n, name in enumerate(awkward)]
    overrides[2] = 'evaluation.suites.s2={data: "two\\nlines"}'
    config = load_config(Path("mine.yaml"), [text.replace('"\'"', '"\'"') for text in overrides])
    found = {item.key: (item.value, item.source) for item in effective(config)}
    assert [found[f"evaluation.suites.s{n}.data"] for n in range(len(awkward))] == [
        (name, "override") for name in awkward
    ]


def test_settings_of_other_methods_are_listed_only_if_given(config):
    assert set(yaml.safe_load(expand(config))["algorithm"]) & {"grpo", "gspo", "settings"} == set()
    other = load_config(Path("mine.yaml"), ["algorithm.name=grpo"])
    tree = yaml.safe_load(expand(other))["algorithm"]
    assert tree["lp_reg"] == {"rho": 0.2, "k3_clamp": "none"}
    assert tree["grpo"]["clip_high"] == 0.2


def test_an_empty_section_of_another_method_is_the_same_as_none(config):
    empty = load_config(Path("mine.yaml"), ["algorithm.grpo={}"])
    assert empty.algorithm == load_config(Path("mine.yaml"), []).algorithm


def test_fixed_tau_replaces_min_p(config):
    tau = load_config(Path("mine.yaml"), ["algorithm.lp_reg.fixed_tau=0.1"])
    tree = yaml.safe_load(expand(tau))["algorithm"]["lp_reg"]
    assert tree["fixed_tau"] == 0.1 and "min_p" not in tree
    Path("again.yaml").write_text(expand(tau))
    assert load_config(Path("again.yaml"), []) == tau


def test_a_config_of_an_earlier_version_compares_equal(config):
    """Earlier versions wrote a section for every method, with null for each setting that was not given."""
    tree = config.model_dump(mode="json")
    unset = dict.fromkeys(tree["algorithm"]["lp_reg"])
    tree["algorithm"]["lp_reg"] = unset | {"rho": 0.2, "k3_clamp": "none"}
    tree["algorithm"]["grpo"] = {"clip_low": None, "aggregation": None}
    old = yaml.safe_dump(tree)
    assert read_expanded(old) == read_expanded(expand(config))
    assert read_expanded("- 1") == [1]
    assert read_expanded("algorithm: {name: gone}") == {"algorithm": {"name": "gone"}}
