"""Warm-start traces: attempts with verdicts, occasional retries (`wait`) and a little noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rl.data.countdown.model import CALCULATOR
from megatron_rl.data.countdown.problems import Numbers, Problem, attempts, prompt, solutions

MAX_TRIES = 4
"""Largest number of attempts. Four attempts with three retries make 45 tokens; a response has at most 46."""
FILLERS = ("hmm", "so")


@dataclass(frozen=True, slots=True)
class Mix:
    """Probabilities of the traces in one phase of the warm start."""

    oracle: float
    """Probability that an attempt is drawn from the solutions instead of all attempts."""
    wait_after_no: float
    """Probability of a retry after the verdict `no`."""
    wait_after_ok: float
    """Probability of a retry after the verdict `ok`."""
    noise: float
    """Probability of a filler before the end."""
    calculator: float = 0.0
    """Probability that a calculator computes an attempt: `3 + 5 calc 8 * 7 calc 56`."""


MIX_A = Mix(oracle=0.2, wait_after_no=0.03, wait_after_ok=0.03, noise=0.02)
MIX_B = Mix(oracle=0.35, wait_after_no=0.025, wait_after_ok=0.015, noise=0.01)
MIX_CALCULATOR = replace(MIX_B, calculator=0.1)


def response(rng: random.Random, numbers: Numbers, target: int, mix: Mix) -> str:
    """Draws one response with a correct verdict after every attempt. The response ends with `<eos>`."""
    words: list[str] = []
    for tries in range(1, MAX_TRIES + 1):
        pool = solutions(numbers, target) if rng.random() < mix.oracle else attempts(numbers)
        attempt = rng.choice(pool)
        solved = attempt.result == target
        calls = mix.calculator and rng.random() < mix.calculator
        words += [attempt.text.replace("=", CALCULATOR) if calls else attempt.text, "ok" if solved else "no"]
        draw = rng.random()
        if tries == MAX_TRIES or draw >= (mix.wait_after_ok if solved else mix.wait_after_no):
            break
        words.append("wait")
    if draw > 1 - mix.noise:
        words.append(rng.choice(FILLERS))
    words.append("<eos>")
    return " ".join(words)


def traces(problems: Sequence[Problem], count: int, mix: Mix, seed: int) -> dict[str, list[str]]:
    """Draws `count` traces of uniformly drawn problems and returns the columns `prompt` and `response`."""
    rng = random.Random(seed)
    columns: dict[str, list[str]] = {"prompt": [], "response": []}
    for _ in range(count):
        problem = rng.choice(problems)
        order = tuple(rng.sample(problem.numbers, 3))
        columns["prompt"].append(prompt(order, problem.target))
        columns["response"].append(response(rng, problem.numbers, problem.target, mix))
    return columns
