"""Tasks of the released reasoning-gym: deterministic, held out from training, scored by their own scorers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.config.reward import RewardSettings
from megatron_rl.data.environments import write_tasks
from megatron_rl.data.rows import read_rows
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardPool, load_reward
from megatron_rl.types import Prompt, Response, RewardResult, Sample

gym = pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.environments

SETTINGS = RewardSettings(name="reasoning-gym", workers=1, timeout_seconds=60)
KINDS = ("chain_sum", "word_ladder", "gsm_symbolic", "acre", "list_functions", "rearc", "prime_factorization", "sudoku")
"""Some make a table of all problems first; JSON would change the problems of rearc; the scorer of prime_factorization
raises for some answers."""


def rows(task: str, *, held_out: bool = False, size: int = 3, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    from megatron_rl.environments.reasoning_gym import tasks

    return list(tasks(task, TaskSettings(size=size, seed=seed, settings=settings), held_out))


def sample(row: dict[str, Any], text: str) -> Sample:
    label = json.loads(json.dumps(row["label"]))  # as it comes from a file
    return Sample(Prompt("p", (1,), row["prompt"], label), Response([1], [0.0], "stop", 0), text)


def test_the_same_seed_makes_the_same_problems_in_every_process() -> None:
    script = (
        "import json; from tests.environments.test_reasoning_gym import rows; "
        "print(json.dumps([rows(task, seed=1) for task in ('chain_sum', 'maze', 'list_functions', 'pool_matrix')]))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert json.loads(found[0])[0] == rows("chain_sum", seed=1) != rows("chain_sum")


@pytest.mark.parametrize("task", ["list_functions", "pool_matrix"])
def test_problems_do_not_depend_on_random_numbers_that_others_draw(task: str) -> None:
    """The generators of these tasks draw from the random numbers that all of a process share."""
    first = rows(task, size=20)
    random.seed(7)
    np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert rows(task, size=20) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_training_never_has_a_problem_of_an_evaluation() -> None:
    """Two terms of one digit have so few problems that every large set has all of them."""
    settings = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    train = {row["prompt"] for row in rows("chain_sum", size=3000, **settings)}
    test = {
        row["prompt"] for seed in (0, 7) for row in rows("chain_sum", held_out=True, size=200, seed=seed, **settings)
    }
    assert len(train) > 100 and len(test) > 5 and not train & test


@pytest.mark.parametrize("task", KINDS)
def test_the_tasks_own_scorer_grades(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # word_ladder wants it; all is done in this process
    grade = load_reward(SETTINGS)
    for row in rows(task, seed=2):
        answer = row["label"]["answer"]
        right: RewardResult = grade(sample(row, f"<think>so</think> <answer>no</answer> <answer>\n{answer}\n</answer>"))
        assert (right.score, right.detail, right.answer) == (1.0, "correct", answer.strip())
        for text in (answer, rf"So \boxed{{{answer}}}.", rf"<answer> \boxed{{{answer}}} </answer>"):
            assert grade(sample(row, text)).score == 1.0
        assert grade(sample(row, "<answer>no idea</answer>")).score < 0.1


def test_problems_are_graded_in_the_reward_workers() -> None:
    row = rows("chain_sum", size=1)[0]
    texts = [row["label"]["answer"], "no", row["label"]["answer"]]
    with RewardPool(SETTINGS) as pool:
        results = pool.score([sample(row, text) for text in texts])
    assert [result.score == 1 for result in results] == [True, False, True]
    assert all(result.has_score for result in results)


def test_an_answer_that_is_a_program_is_not_run() -> None:
    row = rows("string_insertion", size=1)[0]
    grade = load_reward(SETTINGS)
    result: RewardResult = grade(sample(row, "<answer>entry['answer']</answer>"))
    assert (result.score, result.detail) == (0.0, "the task would run the answer as a program")
    assert grade(sample(row, f"<answer>{list(row['label']['answer'])}</answer>")).score == 0.1


@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_problem_that_the_package_makes_otherwise_is_no_zero(part: str) -> None:
    row = rows("chain_sum", size=1)[0]
    row["label"][part] = "another"
    with pytest.raises(ValueError, match="makes another problem"):
        load_reward(SETTINGS)(sample(row, "1"))


@pytest.mark.parametrize(
    ("task", "choice", "message"),
    [
        ("chain_summ", {}, "has no task 'chain_summ'; did you mean chain_sum"),
        ("chain_sum", {"min_terms": 0}, "the task refuses them: AssertionError"),
        ("chain_sum", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("chain_sum", {"seed": 1}, "set tasks.seed instead"),
        ("ransom_note", {}, "PYTHONHASHSEED=0"),
        ("word_ladder", {}, "PYTHONHASHSEED=0"),
    ],
)
def test_bad_names_and_settings_are_errors_with_the_key(
    task: str, choice: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match=message) as caught:
        write_tasks(Path(f"reasoning-gym:{task}"), "data.train", "train", TaskSettings(size=2, settings=choice))
    assert str(caught.value).startswith(f"data.train: reasoning-gym:{task}: ")


def test_a_task_without_enough_problems_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.environments.reasoning_gym._is_held_out", lambda question: False)
    with pytest.raises(UserError, match=r"too few different problems for evaluation .*: 0 of 2 in 100 draws"):
        rows("chain_sum", held_out=True, size=2)


def test_the_file_has_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _cache_assets

    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path))
    task = Path("reasoning-gym:chain_sum")
    file = write_tasks(task, "data.train", "train", TaskSettings(size=5, seed=1))
    assert [row for _, row in read_rows(file)] == rows("chain_sum", size=5, seed=1)
    assert write_tasks(task, "data.train", "train", TaskSettings(size=5, seed=1)) == file
    others = [
        write_tasks(task, "k", split, TaskSettings(size=5, seed=seed)) for split, seed in (("test", 1), ("train", 2))
    ]
    assert len({file, *others}) == 3
    assert len(list(read_rows(write_tasks(task, "k", "test", None)))) == 100
    assert np.array_equal(sorted(path.parent for path in others), [file.parent] * 2)
