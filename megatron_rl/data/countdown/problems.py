"""Countdown problems: three numbers, a target, and every attempt that the rules allow.

An attempt is `x op y = z op w = r`. It uses each number once, from left to right without precedence, and every result
is in 0..80.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

LARGEST = 80
"""Largest number of the task. The smallest is 0."""
LARGEST_GIVEN = 9
OPERATORS = ("+", "-", "*")

RL_MIN_SHARE = 0.12
"""Smallest share of solutions among the attempts of an RL problem.

With rarer solutions, a small policy gets no reward to learn from.
"""

Numbers = tuple[int, ...]
"""The three numbers of a problem."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt and its final result."""

    text: str
    """The attempt as written: `3 + 5 = 8 * 7 = 56`."""
    result: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Numbers, target and difficulty of a problem."""

    numbers: Numbers
    """The given numbers in ascending order."""
    target: int
    share: float
    """Fraction of all attempts that reach the target."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint splits of the problems: no pair of numbers and target is in two of them."""

    train: list[Problem]
    held_out: list[Problem]
    fresh: list[Problem]
    """A second evaluation split, which must not be used for tuning."""


def calculate(x: int, operator: str, y: int) -> int | None:
    """Returns the result of one operation, or None if it is outside 0..80."""
    result = x + y if operator == "+" else x - y if operator == "-" else x * y
    return result if 0 <= result <= LARGEST else None


@cache
def attempts(numbers: Numbers) -> tuple[Attempt, ...]:
    """Returns every attempt with these numbers. Equal numbers count as distinct, so an attempt may occur twice."""
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
    """Returns the attempts that reach the target."""
    return tuple(attempt for attempt in attempts(numbers) if attempt.result == target)


def all_problems() -> list[Problem]:
    """Returns all 1,791 solvable problems with given numbers in 1..9 and a target of at least 1."""
    problems = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_GIVEN + 1), 3):
        results = [attempt.result for attempt in attempts(numbers)]
        # dict.fromkeys keeps the order of first occurrence, on which the shuffle in split_problems depends.
        problems += [Problem(numbers, t, results.count(t) / len(results)) for t in dict.fromkeys(results) if t >= 1]
    return problems


def split_problems(seed: int, held_out: int = 400, fresh: int = 400) -> Splits:
    """Splits the problems at random. The same seed always gives the same splits."""
    problems = all_problems()
    random.Random(seed).shuffle(problems)
    return Splits(
        train=problems[held_out + fresh :],
        held_out=problems[:held_out],
        fresh=problems[held_out : held_out + fresh],
    )


def label(numbers: Numbers, target: int) -> str:
    """Returns the label that the verifier reads: `3 5 7 > 22`."""
    return f"{' '.join(map(str, numbers))} > {target}"


def prompt(numbers: Numbers, target: int) -> str:
    """Returns the prompt of seven tokens: `<bos> 3 5 7 > 22 :`."""
    return f"<bos> {label(numbers, target)} :"
