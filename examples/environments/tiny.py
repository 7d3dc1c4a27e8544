"""Two models of 0.6M parameters, small enough to train in these environments on two cores within minutes.

    python examples/environments/tiny.py        # writes runs/tiny-sums and runs/tiny-guess

Each folder has a model that knows the words of its environment only, and traces for a warm start that leaves the model
with bad habits: sums that are often wrong, and guesses that often ignore what was heard.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.data.countdown.model import BOS, EOS, PAD, write_model
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.environments.reasoning_gym import tasks

TRACES = 20_000
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
RIGHT = 0.5
"""Share of the traces whose sum is right; any other is drawn at random."""
NUMBERS, RANGES, GUESSES = 8, 12, 4
"""Numbers in a range, ranges, and guesses in a game."""
SENSIBLE = 0.3
"""Share of the guesses that agree with what was heard; any other is drawn at random."""
QUESTION = "I think of a number from {} to {}. Guess it: answer with a number alone."
CHAT = (
    "{% for message in messages %}{{ message.role + ' ' + message.content }}"
    "{% if message.role == 'assistant' %}" + EOS + "{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def sums(rng: random.Random) -> tuple[list[str], list[str]]:
    problems = tasks("chain_sum", TaskSettings(size=400, seed=0, settings=SUMS), held_out=False)
    chosen = rng.choices([problem["prompt"] for problem in problems], k=TRACES)
    return chosen, [f"{_sum(text) if rng.random() < RIGHT else rng.randint(-9, 18)} {EOS}" for text in chosen]


def _sum(question: str) -> int:
    left, operator, right = question.split()[-4:-1]
    return int(left) + int(operator + right)


def guesses(rng: random.Random) -> tuple[list[str], list[str]]:
    lowest = [rng.randint(1, RANGES) for _ in range(TRACES)]
    asked = [f"user {QUESTION.format(low, low + NUMBERS - 1)} assistant" for low in lowest]
    return asked, [_conversation(rng, low) for low in lowest]


def _conversation(rng: random.Random, lowest: int) -> str:
    numbers = possible = range(lowest, lowest + NUMBERS)
    secret = rng.choice(numbers)
    said: list[str] = []
    for _ in range(GUESSES):
        guess = rng.choice(possible if rng.random() < SENSIBLE else numbers)
        said.append(f"{guess} {EOS}")
        if guess == secret:
            break
        said.append(f"user {'Higher.' if guess < secret else 'Lower.'} assistant")
        low, high = (guess + 1, possible.stop) if guess < secret else (possible.start, guess)
        possible = range(max(low, possible.start), min(high, possible.stop))
    return " ".join(said[: 2 * GUESSES - 1])


def write(folder: Path, traces: tuple[list[str], list[str]], words: Iterable[str], *, chat: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {word for part in traces for text in part for word in text.split()} - {PAD, BOS, EOS}
    write_model(folder / "model", 0, (PAD, BOS, EOS, *sorted(known.union(words))))
    if chat:
        tokenizer = load_tokenizer(folder / "model")
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder / "model")
    pq.write_table(pa.table({"prompt": traces[0], "response": traces[1]}), folder / "warm_start.parquet")


def main() -> None:
    rng = random.Random(0)
    numbers = [*map(str, range(-9, 19)), "+", "-"]
    write(Path("runs/tiny-sums"), sums(rng), numbers)
    write(Path("runs/tiny-guess"), guesses(rng), ["That", "is", "no", "number."], chat=True)


if __name__ == "__main__":
    main()
