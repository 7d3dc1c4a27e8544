"""Fuzzing of every parser of ours: whatever the input, the outcome is a result, or the error that the parser documents.

The number of examples is the profile's: 25 in `quick`, 150 in `nightly` (HYPOTHESIS_PROFILE).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rl.config.load import load_config
from megatron_rl.config.overrides import apply_override, parse_override
from megatron_rl.config.yaml_text import dump_yaml, leaves, parse_yaml
from megatron_rl.data.rows import read_rows
from megatron_rl.data.schemas import recognise
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_shards import parse_bytes
from megatron_rl.observability.diagnosis import read_findings
from megatron_rl.observability.metrics import metric_names, read_metrics, series
from megatron_rl.observability.provenance import in_words, read_provenance
from megatron_rl.observability.state import progress, read_state
from megatron_rl.reward.code.cases import passes, read_cases
from megatron_rl.reward.code.verifier import last_block
from megatron_rl.reward.results import result_of
from tests.hf_models import config_json
from tests.unit.test_hostile_files import MANIFEST_OF

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/countdown.yaml"
several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))
keys = st.sampled_from(["actor.tensor_parallel", "train.steps", "algorithm.name", "evaluation.suites", "reward.code"])


def changed(original: Any, data: st.DataObject) -> Any:
    """A JSON value with one part of it replaced."""
    copy = json.loads(json.dumps(original))
    node = copy
    while True:
        key = data.draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else 0
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(values)
        return copy


@given(text=st.text(max_size=200) | st.builds(dump_yaml, st.dictionaries(st.text(max_size=6), values, max_size=4)))
def test_yaml_has_a_value_or_an_error(text: str) -> None:
    try:
        parse_yaml(text)
        leaves(text)
    except yaml.YAMLError:
        pass


@several
@given(text=st.text(max_size=40) | st.builds(lambda key, value: f"{key}={json.dumps(value)}", keys, values))
def test_an_override_is_applied_or_refused(text: str) -> None:
    try:
        apply_override({"train": {"steps": 1}, "evaluation": {"suites": [{}]}}, parse_override(text))
        load_config(QUICKSTART, [text])
    except UserError:
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda folder: [series(read_metrics(folder), name) for name in metric_names(read_metrics(folder))],
    "warnings.jsonl": read_findings,
    "provenance.jsonl": lambda folder: in_words(read_provenance(folder)),
    "state.json": lambda folder: (read_state(folder), progress(folder, 0.0)),
    "rows.jsonl": lambda folder: [
        recognise(list(row), label_field=None, source=place).prompt(row)
        for place, row in read_rows(folder / "rows.jsonl")
    ],
    MANIFEST: read_manifest,
}
GOOD: dict[str, Any] = {
    "metrics.jsonl": {"step": 1, "time": 2.0, "reward/mean": 0.5},
    "warnings.jsonl": {"step": 1, "name": "n", "what": "w", "remedy": "r"},
    "provenance.jsonl": {
        "time": 1.0, "version": "1", "commit": None, "python": "3", "packages": {"torch": "2"}, "host": "h",
        "hosts": ["h"], "command": "c", "seed": 1, "sha256": {"a": "b"},
    },
    "state.json": {"total_steps": 3, "phase": "p", "since": 1.0, "pid": 1, "host": "h", "step": 1},
    "rows.jsonl": {"prompt": [{"role": "user", "content": "x"}], "label": "y"},
    MANIFEST: MANIFEST_OF,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@several
@given(data=st.data())
def test_a_file_has_a_meaning_or_an_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    (tmp_path / name).write_text(json.dumps(GOOD[name]) + "\n")
    READERS[name](tmp_path)
    line = json.dumps(changed(GOOD[name], data)).encode() if data.draw(st.booleans()) else data.draw(st.binary())
    (tmp_path / name).write_bytes(line + b"\n" + line + b"\n" if name.endswith("l") else line)
    try:
        READERS[name](tmp_path)
    except UserError:
        pass
    except ValueError as error:  # the schema's, which the caller joins with the place
        assert name == "rows.jsonl" and "column" in str(error)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
@given(data=st.data())
def test_a_config_json_is_a_model_or_an_error(family: str, data: st.DataObject) -> None:
    with contextlib.suppress(UserError):
        Architecture.from_hf(changed(config_json(family), data))


@given(label=values | st.text(), output=st.text(max_size=20), value=values)
def test_a_label_has_tests_or_a_value_error(label: Any, output: str, value: Any) -> None:
    try:
        cases = read_cases(label)
    except ValueError:
        return
    for case in cases:
        if hasattr(case, "expected") or hasattr(case, "stdout"):
            passes(case, output, value)  # type: ignore[arg-type]


@given(
    text=st.text() | st.lists(st.sampled_from(["```", "```python\n", "~~~", "> ", "- ", "\n", "x", " "])).map("".join)
)
def test_every_response_has_a_block_or_none(text: str) -> None:
    assert last_block(text) is None or isinstance(last_block(text), str)


@given(value=values)
def test_what_a_reward_returns_is_a_result_or_a_known_error(value: Any) -> None:
    with contextlib.suppress(TypeError, ValueError):
        result_of(value)


@given(text=st.text(max_size=12) | st.from_regex(r"[0-9]{0,30}(\.[0-9]+)? ?[kKmMgG]?i?[bB]?", fullmatch=True))
def test_a_size_is_a_number_of_bytes_or_an_error(text: str) -> None:
    with contextlib.suppress(UserError):
        assert parse_bytes(text) >= 0
