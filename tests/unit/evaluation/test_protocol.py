"""Suite files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.protocol import BUILT_IN, load_protocol

GOOD = "reward: {name: math}\nsuites: {a: a.jsonl, b: {data: b.parquet, temperature: 0.6, samples_per_prompt: 16}}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_text("")

    def write(text: str) -> str:
        (tmp_path / "suites.yaml").write_text(text)
        return "suites.yaml"

    return write


def test_a_suite_is_a_path_or_a_section(write) -> None:
    protocol = load_protocol(write(GOOD))
    a, b = protocol.suites["a"], protocol.suites["b"]
    assert (a.data, a.samples_per_prompt, a.temperature, a.max_response_tokens) == (Path("a.jsonl"), 1, 0.0, 8192)
    assert (b.samples_per_prompt, b.temperature, b.max_response_tokens) == (16, 0.6, 8192)


def test_selected_suites_are_read_from_another_folder(write, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.parquet").write_text("")
    protocol = load_protocol(write(GOOD), Path("data"), ["b"])
    assert list(protocol.suites) == ["b"] and protocol.suites["b"].data == Path("data/b.parquet")


def test_the_suite_file_of_the_paper(tmp_path: Path) -> None:
    for name in ("aime-2024", "aime-2025", "math-500", "minerva", "olympiadbench"):
        (tmp_path / f"{name}.parquet").write_text("")
    suites = load_protocol("paper", tmp_path).suites
    for name in ("aime24", "aime25"):
        assert (suites[name].temperature, suites[name].samples_per_prompt) == (0.6, 16)
    for name in ("math500", "minerva", "olympiadbench"):
        assert (suites[name].temperature, suites[name].samples_per_prompt) == (0.0, 1)
    assert {suite.max_response_tokens for suite in suites.values()} == {8192}
    assert (BUILT_IN / "paper.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "reward: {name: math}\nsuites: {a: a.jsonl}\ntemprature: 1\n",
            "unknown key temprature; did you mean temperature?",
        ),
        ("reward: {name: math}\nsuites: {a: {data: a.jsonl, sample: 3}}\n", "unknown key suites.a.sample"),
        ("suites: {a: a.jsonl}\n", "reward: Field required"),
        ("reward: {name: math}\nsuites: {}\n", "suites: .*at least 1"),
        ("reward: {name: math}\nsuites: {a: a.jsonl}\ntemperature: hot\n", r"temperature: .*\('hot' given\)"),
        ("reward: {name: math}\nsuites: {a: gone.jsonl}\n", "a: gone.jsonl\n.*data prepare"),
        ("a: [", "not valid YAML"),
        ("- a", "the file: "),
    ],
)
def test_an_invalid_suite_file_is_refused_with_the_reason(write, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_protocol(write(text))


def test_unknown_names_are_refused(write) -> None:
    with pytest.raises(UserError, match="no suite file papr; built in: paper"):
        load_protocol("papr")
    with pytest.raises(UserError, match="has no suite c; it has a, b"):
        load_protocol(write(GOOD), None, ["c"])
