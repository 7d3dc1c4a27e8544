"""Maths answers graded per second by the pool of reward workers, as in a run.

    python benchmarks/maths_reward.py [--workers 2] [--out benchmarks/results/maths_reward.json]

There are two batches. `as in training`: 512 prompts with 8 responses each, half of them right, with repeated wrong
answers; labels are mixed as in competition sets (most are integers). `nothing repeats`: the pairs of the grading corpus
without the hostile ones, each pair once, so that no cache of answers or labels helps. Each batch is timed after the
workers have started, three times with fresh workers; the best and the worst are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward import RewardPool
from megatron_rl.types import Prompt, Response, Sample

ROOT = Path(__file__).parents[1]
PROMPTS, RESPONSES, REPEATS = 512, 8, 3
FILLER = "Let us think step by step: consider the equation $x^2 + 1 = {y}$ and wait, check it again. " * 80
"""About 7,000 characters: a response of some 2,000 tokens."""


def sample(prompt: int, label: str, answer: str) -> Sample:
    response = Response([1], [0.0], "stop", 0)
    text = f"{FILLER}The answer is \\boxed{{{answer}}}."
    return Sample(Prompt(f"bench:{prompt}", (1,), "", label), response, text)


def as_in_training(seed: int) -> list[Sample]:
    draw = random.Random(seed)
    samples = []
    for prompt in range(PROMPTS):
        n, m = draw.randint(2, 999), draw.randint(2, 99)
        kind = draw.choices(("integer", "fraction", "radical", "set", "expression", "words"), (60, 15, 10, 5, 8, 2))[0]
        right = {
            "integer": [str(n)],
            "fraction": [rf"\frac{{{n}}}{{{m}}}", f"{n}/{m}", rf"\dfrac{{{2 * n}}}{{{2 * m}}}"],
            "radical": [rf"{m}\sqrt{{{n}}}", rf"\sqrt{{{n}}} \cdot {m}", rf"\sqrt{{{m * m * n}}}"],
            "set": [rf"\{{{n}, {m}\}}", rf"\{{{m},{n}\}}", f"{n}, {m}"],
            "expression": [f"x^2+{n}x+{m}", f"{m}+{n}x+x^2"],
            "words": [r"\text{even}", "even"],
        }[kind]
        wrong = [
            answer.replace(str(m), str(m + k)).replace(str(n), str(n + k)) + ("" if kind != "words" else "ly")
            for k in (1, 2, 3)
            for answer in right
        ]
        answers = draw.choices(right, k=4) + draw.choices(wrong, k=4)
        samples += [sample(prompt, right[0], answer) for answer in answers]
    return samples


def nothing_repeats() -> list[Sample]:
    groups = yaml.safe_load((ROOT / "tests/unit/reward/grading_corpus.yaml").read_text())
    pairs = [pair for g in groups if g["group"] != "hostile" for pair in g.get("equal", []) + g.get("unequal", [])]
    return [sample(i, label, answer) for i, (label, answer) in enumerate(pairs) if isinstance(answer, str)]


def processor_time() -> float:
    """Returns the processor time of the workers so far, which a busy machine disturbs less than wall time."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())


def rate(samples: list[Sample], workers: int) -> dict[str, Any]:
    seconds, processor_seconds = [], []
    for _ in range(REPEATS):
        with RewardPool(RewardSettings(name="math", workers=workers)) as pool:
            pool.score([sample(0, r"\sqrt{8}", r"2\sqrt{2}+0")] * 2 * workers)
            start, used = time.perf_counter(), processor_time()
            results = pool.score(samples)
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(processor_time() - used)
    return {
        "answers": len(samples),
        "answers_per_second_best": round(len(samples) / min(seconds)),
        "answers_per_second_worst": round(len(samples) / max(seconds)),
        "answers_per_processor_second": round(len(samples) / min(processor_seconds)),
        "mean_score": round(sum(result.score for result in results) / len(results), 3),
        "without_score": sum(result.outcome != "score" for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/maths_reward.json")
    options = parser.parse_args()
    batches = {"as in training": as_in_training(0), "nothing repeats": nothing_repeats()}
    results = {name: rate(samples, options.workers) for name, samples in batches.items()}
    for name, result in results.items():
        print(name, result)
    load = os.getloadavg()[0]  # load of all programs meanwhile, these workers included
    kept = {"machine": machine(), "load_average": load, "workers": options.workers, "batches": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
