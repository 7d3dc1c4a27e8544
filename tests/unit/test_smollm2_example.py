"""The preparation of the SmolLM2 example: problems and labels, without the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.config import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_prepare", EXAMPLE / "prepare.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (11.0, "11"),
        (0.5, "0.5"),
        ("9 (apples)", "9"),
        ("1,200 (m)", "1200"),
        ("7:30", None),
        ("2 (cats); 3 (dogs)", None),
    ],
)
def test_labels_are_plain_numbers(prepare: ModuleType, value: object, label: str | None) -> None:
    assert prepare.number(value) == label


def test_no_problem_is_in_two_files(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "HELD_OUT", 2)

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("mawps_singleop.jsonl", [{"input": f"m{i % 5}?", "target": float(i % 5)} for i in range(9)])
    write("asdiv.jsonl", [{"body": f"a{i}.", "question": "b?", "answer": f"{i} (apples)"} for i in range(5)])
    write("svamp.jsonl", [{"Body": f"a{i}.", "Question": "b?", "Answer": float(i)} for i in range(9)])
    prepare.write_problems(tmp_path, tmp_path)
    names = ("train", "mawps", "asdiv", "svamp")
    prompts = {name: [json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()] for name in names}
    assert {name: len(found) for name, found in prompts.items()} == {"train": 6, "mawps": 2, "asdiv": 2, "svamp": 2}
    together = [prompt for found in prompts.values() for prompt in found]
    assert len(set(together)) == len(together), "svamp leaves out what asdiv has already"


def test_the_configuration_loads() -> None:
    config = load_config(EXAMPLE / "lp_reg.yaml", ["model.path=.", "data.train=README.md"])
    assert config.warm_start and config.warm_start.phases[0].data.name == "warm_start.parquet"
