"""reasoning-gym: procedural tasks of one turn, each with a scorer of its own.

Problem `i` of a task under a seed depends on nothing else, so that a prompt's label only names it, and the verifier
makes the problem again with everything that its scorer looks at.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.config.reward import RewardSettings
from megatron_rl.environments.evaluated_answers import is_program
from megatron_rl.environments.library import library
from megatron_rl.errors import UserError
from megatron_rl.types import RewardResult, Sample
from megatron_rl.utils.boxed import last_boxed

PACKAGE = "reasoning-gym"
HELD_OUT = 10
"""One problem in so many, by a hash of the question, is held out for evaluation."""
DRAWS = 50
"""Most draws for each problem that is wanted; a task that needs more has too few different problems."""
SEEDS_APART = 10**7
"""reasoning-gym draws problem `i` under seed `s` from the random numbers `s + i`: seeds must be further apart than a
data set is long."""
CACHED = 4096
"""Problems that a worker keeps: the responses to one prompt come close together."""
BY_HASH = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Tasks of reasoning-gym 0.1.25 that iterate over sets of texts, whose order is another in every process of Python."""
HASH_SEED = "PYTHONHASHSEED"
Label = dict[str, Any]
LABEL = {"task": str, "number": int, "settings": dict, "question": str, "answer": str}
"""Keys of a label, and their types. `question` is a hash: some tasks have two answers only, or none of their own."""


def tasks(name: str, settings: TaskSettings, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yields the rows of a task: the question, and a label that names the problem.

    held_out: the problems that no training has, whatever its seed. Raises UserError for an unknown task, and for
    settings that the task does not take.
    """
    _check_task(name)
    if taken := {"seed", "size"} & set(settings.settings):
        raise UserError(f"tasks.settings.{min(taken)}: set tasks.{min(taken)} instead")
    draws, found = DRAWS * settings.size, 0
    choice = settings.settings | {"seed": settings.seed * SEEDS_APART, "size": draws}
    source = _dataset(name, choice)
    for number in range(draws):
        try:
            entry = _make(source, number)
        except Exception as error:  # a generator may raise anything for settings that contradict each other
            raise UserError(f"the task cannot make problem {number}: {type(error).__name__}: {error}") from error
        if _is_held_out(entry["question"]) == held_out:
            found += 1
            label = {"task": name, "number": number, "settings": choice, **_sign(entry)}
            yield {"prompt": entry["question"], "label": label}
        if found == settings.size:
            return
    kind = "for evaluation" if held_out else "for training"
    raise UserError(
        f"the task has too few different problems {kind} with these settings: {found} of {settings.size} in "
        f"{draws} draws. Lower tasks.size, or let tasks.settings allow more"
    )


def read_label(label: object) -> Label:
    """Returns the label if `tasks` made it. Raises ValueError for any other."""
    if isinstance(label, dict) and all(isinstance(label.get(key), kind) for key, kind in LABEL.items()):
        return label
    raise ValueError(
        f"{str(label)[:80]!r} names no problem of reasoning-gym; data: reasoning-gym:TASK makes such labels"
    )


class ReasoningGymReward:
    r"""Scores a response by the task's own scorer, from 0 to 1.

    The answer is the text in the last pair of <answer> tags, or the whole text of a response without them; if this text
    has a `\boxed{}`, the answer is the content of the last one. So each of `data.template` can be used.
    """

    def __init__(self, settings: RewardSettings) -> None:
        """Raises UserError if reasoning-gym is not installed."""
        library("reasoning_gym", PACKAGE)

    def __call__(self, sample: Sample) -> RewardResult:
        label = read_label(sample.prompt.label)
        task, settings = label["task"], json.dumps(label["settings"])
        entry = _problem(task, label["number"], settings)
        if _sign(entry) != {key: label[key] for key in ("question", "answer")}:
            raise ValueError("the installed reasoning-gym makes another problem than the one that was asked")
        answer = _answer(sample.text)
        if is_program(task, answer):
            return RewardResult(0.0, answer, "the task would run the answer as a program")
        source = _cached(task, settings)
        try:
            score = float(source.score_answer(answer=answer, entry=entry))
        except Exception as error:  # some scorers cannot read every text
            source.score_answer(answer=label["answer"], entry=entry)  # a scorer that fails at all fails here too
            return RewardResult(0.0, answer, f"the task cannot read the answer: {type(error).__name__}")
        return RewardResult(score, answer, "correct" if score == 1 else "wrong" if score == 0 else "partly correct")


@lru_cache(maxsize=CACHED)
def _problem(task: str, number: int, settings: str) -> dict[str, Any]:
    return _make(_cached(task, settings), number)


@lru_cache(maxsize=64)
def _cached(task: str, settings: str) -> Any:
    """A task's data set. Settings are a text, as a cache needs it."""
    return _dataset(task, json.loads(settings))


def _dataset(task: str, settings: dict[str, Any]) -> Any:
    create = library("reasoning_gym", PACKAGE).create_dataset
    try:
        with _shared_random_numbers(settings["seed"]):
            return create(task, **settings)
    except Exception as error:  # a task checks its settings by assertions, or fails with them
        raise UserError(f"tasks.settings: the task refuses them: {type(error).__name__}: {error}") from error


def _make(source: Any, number: int) -> dict[str, Any]:
    """Returns a problem, which depends on the data set's settings and the number alone."""
    with _shared_random_numbers(source.seed + number):
        problem: dict[str, Any] = source[number]
    return problem


@contextmanager
def _shared_random_numbers(seed: int) -> Iterator[None]:
    """Seeds the random numbers that all of a process share, and afterwards restores them.

    Some generators of reasoning-gym (list_functions, pool_matrix in 0.1.25) draw from them or seed them.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _check_task(name: str) -> None:
    library("reasoning_gym", PACKAGE)
    known = library("reasoning_gym.factory", PACKAGE).DATASETS
    if name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(known))}"
        raise UserError(f"reasoning-gym has no task {name!r}{hint}")
    if name in BY_HASH and not os.environ.get(HASH_SEED, "").isdigit():
        raise UserError(
            f"the problems of {name} depend on the order of Python's sets, which is another in each process: start the "
            f"run with {HASH_SEED}=0 in its environment"
        )


def _is_held_out(question: str) -> bool:
    return int(_hash(question), 16) % HELD_OUT == 0


def _sign(entry: dict[str, Any]) -> dict[str, str]:
    """Returns what tells a problem from others, as labels have it."""
    return {"question": _hash(entry["question"]), "answer": str(entry["answer"])}


def _hash(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def _answer(text: str) -> str:
    tagged: str | None = library("reasoning_gym.utils", PACKAGE).extract_answer(text)
    text = text.strip() if tagged is None else tagged
    boxed = last_boxed(text)
    return text if boxed is None else boxed.strip()
