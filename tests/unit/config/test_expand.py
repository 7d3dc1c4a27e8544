"""The expanded file of a run's folder loads back to the same configuration, whatever is in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import Config, expand, load_config

TRICKY = st.sampled_from(
    ["no", "Off", "null", "~", "1e-4", "1_000", "0x1F", "2024-01-01", "1:30", ".5", "- a", "# b", " c "]
)
# YAML has no escape for lone surrogates; NUL cannot be in a path.
TEXT = TRICKY | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
NAME = TRICKY.filter(str.isalpha) | st.from_regex(r"\A[A-Za-z0-9_-]{1,8}\Z")
PATHS = TEXT.filter(lambda text: not text.startswith("~"))
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
SHARE = st.none() | st.floats(min_value=1e-12, max_value=1)


@st.composite
def trees(draw: st.DrawFn) -> dict:
    return {
        "run": {"name": draw(TEXT), "folder": draw(PATHS)},
        "seed": draw(st.integers(0, 2**40)),
        "resume": draw(st.sampled_from(["never", "auto"]) | PATHS),
        "model": {"path": draw(PATHS)},
        "data": {"train": draw(PATHS), "label_field": draw(st.none() | TEXT), "shuffle": draw(st.booleans())},
        "rollout": {
            "prompts_per_step": draw(st.integers(1, 512)),
            "samples_per_prompt": draw(st.integers(2, 16)),
            "max_response_tokens": 8,
            "temperature": draw(POSITIVE),
            "stop_token_ids": draw(st.none() | st.lists(st.integers(0, 10**6), min_size=1, max_size=3)),
        },
        "reward": {"name": draw(st.sampled_from(["countdown", "math", "package.module:function"]))},
        "algorithm": {"lp_reg": {"rho": draw(SHARE), "k3_clamp": draw(st.none() | st.just("none") | POSITIVE)}},
        "actor": {
            "optimizer": {"lr": draw(POSITIVE), "betas": draw(st.lists(st.floats(0, 0.999), min_size=2, max_size=2))}
        },
        "train": {"steps": draw(st.integers(1, 10**6))},
        "evaluation": {
            "suites": draw(st.dictionaries(NAME, PATHS, min_size=1, max_size=3)),
            "probes": draw(st.dictionaries(NAME, st.fixed_dictionaries({"after": TEXT, "token": TEXT}), max_size=2)),
        },
    }


@given(trees())
def test_expand_and_load_return_the_same(tree):
    config = Config.model_validate(tree)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(expand(config), encoding="utf-8")
        assert load_config(path, []) == config


@given(trees())
def test_any_yaml_reader_reads_the_same_tree(tree):
    config = Config.model_validate(tree)
    assert yaml.safe_load(expand(config)) == config.model_dump(mode="json")
