"""Countdown with a long tail: 300 noise words, so that the literal proxy has something to drop.

After a verdict a trace has `wait` and another attempt, or one of the noise words, or a filler, or the end. The verifier
ignores noise words that stand alone.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.data.countdown.model import VOCABULARY, write_model
from megatron_rl.data.countdown.problems import Numbers, attempts, prompt, solutions, split_problems
from megatron_rl.data.countdown.traces import FILLERS, MAX_TRIES
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.types import RewardResult, Sample

NOISE = tuple(f"n{number}" for number in range(300))
ORACLE, WAIT_AFTER_NO, WAIT_AFTER_OK = 0.35, 0.055, 0.012
NOISY, FILLED = 0.40, 0.25
"""Shares of the ends that have a noise word, and a filler."""
_NOISE = frozenset(NOISE)
STEPS, BATCH = 180, 128
"""Steps of the warm start on these traces, after those of Countdown itself, and rows of a step."""


def write(folder: Path, seed: int) -> None:
    """Writes `model/`, untrained, and `warm_start_c.parquet`, unless the folder exists; it is complete or missing."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    rng, problems = random.Random(seed), split_problems(seed).train
    columns: dict[str, list[str]] = {"prompt": [], "response": []}
    for _ in range(STEPS * BATCH):
        problem = rng.choice(problems)
        columns["prompt"].append(prompt(tuple(rng.sample(problem.numbers, 3)), problem.target))
        columns["response"].append(response(rng, problem.numbers, problem.target))
    pq.write_table(pa.table(columns), draft / "warm_start_c.parquet")
    write_model(draft / "model", seed, (*VOCABULARY, *NOISE))
    draft.rename(folder)


def response(rng: random.Random, numbers: Numbers, target: int) -> str:
    """Draws one response with a correct verdict after every attempt."""
    words: list[str] = []
    for tries in range(1, MAX_TRIES + 1):
        attempt = rng.choice(solutions(numbers, target) if rng.random() < ORACLE else attempts(numbers))
        solved = attempt.result == target
        words += [attempt.text, "ok" if solved else "no"]
        if tries == MAX_TRIES or rng.random() >= (WAIT_AFTER_OK if solved else WAIT_AFTER_NO):
            break
        words.append("wait")
    end = rng.random()
    if end < NOISY:
        words.append(rng.choice(NOISE))
    elif end < NOISY + FILLED:
        words.append(rng.choice(FILLERS))
    return " ".join([*words, "<eos>"])


def is_noise(word: str) -> bool:
    return word in _NOISE


def verify(sample: Sample) -> RewardResult:
    """Returns the verdict of Countdown's verifier without noise words; 0 if two stand together."""
    words = sample.text.split()
    if any(is_noise(first) and is_noise(second) for first, second in pairwise(words)):
        return RewardResult(0.0, None, "two noise words")
    return verify_countdown(replace(sample, text=" ".join(word for word in words if not is_noise(word))))
