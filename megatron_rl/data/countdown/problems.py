"""Countdown problems: three numbers, a target, and every attempt the rules allow.

An attempt is `x op y = z op w = r`: each number once, no precedence, every intermediate result in 0..80.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

LARGEST = 80
"""No number of the task exceeds it; numbers are never negative."""
LARGEST_GIVEN = 9
OPERATORS = ("+", "-", "*")

RL_MIN_SHARE = 0.12
"""Rarer solutions than this leave a small policy without any reward to learn from."""

Numbers = tuple[int, ...]
"""Always three."""


@dataclass(frozen=True, slots=True)
class Attempt:
    text: str
    """`3 + 5 = 8 * 7 = 56`"""
    result: int


@dataclass(frozen=True, slots=True)
class Problem:
    numbers: Numbers
    """In ascending order."""
    target: int
    share: float
    """The part of all attempts that reach the target."""


@dataclass(frozen=True, slots=True)
class Splits:
    """No problem (numbers and target) is in two of them."""

    train: list[Problem]
    held_out: list[Problem]
    fresh: list[Problem]
    """A second evaluation split, which nobody may tune on."""


def calculate(x: int, operator: str, y: int) -> int | None:
    """The result of one operation, or None outside 0..80."""
    result = x + y if operator == "+" else x - y if operator == "-" else x * y
    return result if 0 <= result <= LARGEST else None


@cache
def attempts(numbers: Numbers) -> tuple[Attempt, ...]:
    """Every attempt with these numbers. Equal numbers count as different ones, so an attempt may occur twice."""
    found = []
    for x, y, w in itertools.permutations(numbers):
        for first, second in itertools.product(OPERATORS, repeat=2):
            z = calculate(x, first, y)
            result = None if z is None else calculate(z, second, w)
            if result is not None:
                found.append(Attempt(f"{x} {first} {y} = {z} {second} {w} = {result}", result))
    return tuple(found)


@cache
def solutions(numbers: Numbers, target: int) -> tuple[Attempt, ...]:
    return tuple(attempt for attempt in attempts(numbers) if attempt.result == target)


def all_problems() -> list[Problem]:
    """All 1,791 solvable problems with given numbers 1..9 and a target of at least 1."""
    problems = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_GIVEN + 1), 3):
        results = [attempt.result for attempt in attempts(numbers)]
        # dict.fromkeys keeps the order of first occurrence: the shuffle below depends on it.
        problems += [Problem(numbers, t, results.count(t) / len(results)) for t in dict.fromkeys(results) if t >= 1]
    return problems


def split_problems(seed: int, held_out: int = 400, fresh: int = 400) -> Splits:
    """The same seed gives the same splits, always."""
    problems = all_problems()
    random.Random(seed).shuffle(problems)
    return Splits(
        train=problems[held_out + fresh :],
        held_out=problems[:held_out],
        fresh=problems[held_out : held_out + fresh],
    )


def label(numbers: Numbers, target: int) -> str:
    """`3 5 7 > 22`, which the verifier reads."""
    return f"{' '.join(map(str, numbers))} > {target}"


def prompt(numbers: Numbers, target: int) -> str:
    """`<bos> 3 5 7 > 22 :`, seven tokens."""
    return f"<bos> {label(numbers, target)} :"
