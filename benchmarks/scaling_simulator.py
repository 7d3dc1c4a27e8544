"""Simulates a run: the product decides which requests the engines get and when, engines and actor only take time.

`simulate` calls the product's own rollout code (`megatron_rl/rollout/collector.py`) step by step, so that
over-sampling, partial rollouts, the bound on staleness and asynchronous rollouts are not implemented again here.
`Fleet` replaces the engines: the length of every response is known from the start, and `Rates` give the time per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.cursor import Cursor
from megatron_rl.rollout.collector import RolloutCollector
from megatron_rl.types import RewardResult

STRIDE = 128
"""Largest number of tokens per response that are decoded at one rate; the rate falls as contexts grow."""

Lengths = np.ndarray
"""[n] int, lengths of the responses of a group."""
LengthsOf = Callable[[int], Lengths]
"""Row of the data -> lengths of the responses to its prompt, always the same ones."""


@dataclass(frozen=True)
class Rates:
    """Times of an engine, in seconds."""

    decode: Callable[[int, float], float]
    """(number of responses, mean number of tokens before) -> seconds of a decoding step."""
    read: Callable[[np.ndarray], float]
    """Lengths of prefixes -> seconds of their prefill."""
    prompt: float
    """Number of tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Response:
    """Stands in for a response of the product, with the same number of tokens but meaningless ids."""

    length: int
    done: int
    weight_version: int

    def __len__(self) -> int:
        return self.done

    @property
    def sequences(self) -> tuple[Response]:
        return (self,)

    @property
    def sampled_mask(self) -> np.ndarray:
        return np.broadcast_to(True, self.done)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.done >= self.length else "abort"

    @property
    def version_runs(self) -> list[tuple[int, int, int]]:
        return [(0, self.done, self.weight_version)]


class Engine:
    """One simulated engine. Its arrays have one entry per response; those of a request are neighbours."""

    def __init__(self) -> None:
        self.length = self.done = self.request = self.version = np.zeros(0, dtype=np.int64)
        self.quota = 0
        """Number of complete groups after which an embedded engine stops."""
        self.tokens, self.pace, self.reading = 0, 0.0, 0.0
        """The present stride: tokens per response, seconds per token, and seconds of prefill before it."""

    def add(self, number: int, length: Lengths, done: np.ndarray, version: np.ndarray) -> None:
        self.length, self.done = np.append(self.length, length), np.append(self.done, done)
        self.request = np.append(self.request, np.full(len(length), number))
        self.version = np.append(self.version, version)

    def remove(self, number: int) -> list[Response]:
        mine = self.request == number
        rows = zip(self.length[mine].tolist(), self.done[mine].tolist(), self.version[mine].tolist(), strict=True)
        responses = [Response(*row) for row in rows]
        self.length, self.done, self.request, self.version = (
            values[~mine] for values in (self.length, self.done, self.request, self.version)
        )
        return responses

    def plan(self, rates: Rates) -> float:
        """Plans the next stride, which ends at the latest with the first response. Returns its seconds; infinite if no
        response is running."""
        alive = self.done < self.length
        if not alive.any():
            return np.inf
        self.tokens = int(min(STRIDE, (self.length - self.done)[alive].min()))
        before = rates.prompt + self.done[alive].mean() + self.tokens / 2
        self.pace = rates.decode(int(alive.sum()), float(before))
        return self.reading + self.tokens * self.pace

    def go_on(self, left: float) -> None:
        """Advances to the point at which so many seconds of the stride are left."""
        if not np.isfinite(left):
            return
        tokens = self.tokens - min(self.tokens, int(np.ceil(left / self.pace - 1e-9)))
        self.reading = max(0.0, left - self.tokens * self.pace)
        self.done = np.where(self.done < self.length, self.done + tokens, self.done)

    def whole(self) -> list[int]:
        """Requests whose responses have all ended."""
        goes_on = self.done < self.length
        whole: list[int] = np.setdiff1d(self.request[~goes_on], self.request[goes_on]).tolist()
        return whole


class Fleet:
    """Replaces the product's `Engines` and the actor's ranks. `cores`: number of cores that all of them share."""

    def __init__(
        self, engines: int, rates: Rates, *, embedded: bool = False, ranks: int = 1, cores: float = np.inf
    ) -> None:
        self.embedded, self.rates, self.ranks, self.cores = embedded, rates, ranks, cores
        self.engines = [Engine() for _ in range(engines)]
        self.left = np.full(engines + 1, np.inf)
        """[engines + 1], seconds of work on a core of its own until the next event of each engine and of the actor."""
        self.now, self.weight_version = 0.0, 0
        self.answers: dict[int, list[Response]] = {}
        self.submitted = 0

    def submit(
        self,
        prompts: Sequence[Lengths],
        sampling: Any,
        partial: Sequence[Sequence[Response]],
        min_groups: int | None = None,
    ) -> list[int]:
        """Dispatches requests like the product: to embedded engines in turn, each of which stops at its share of
        groups, or to the server with the fewest requests.

        A server prefills new requests only; an embedded engine prefills its batch.
        """
        first, self.submitted, count = self.submitted, self.submitted + len(prompts), len(self.engines)
        for i, engine in enumerate(self.engines):
            self._settle(i)
            engine.quota = len(prompts[i::count]) if min_groups is None else len(range(i, min_groups, count))
        load = [len(np.unique(engine.request)) for engine in self.engines]
        prefixes: list[list[int]] = [[] for _ in self.engines]
        gone_on = {i % count for i, before in enumerate(partial) if before} if self.embedded else set()
        for i, (length, before) in enumerate(zip(prompts, partial, strict=True)):
            place = i % count if self.embedded else int(np.argmin(load))
            load[place] += 1
            done = np.array([response.done for response in before] or np.zeros_like(length))
            version = [response.weight_version for response in before] or [self.weight_version] * len(length)
            self.engines[place].add(first + i, length, done, np.array(version))
            rows = (self.rates.prompt + done)[done < length].tolist()
            prefixes[place] += rows if before or place in gone_on else rows[:1]  # one prefill per new prompt
        for i, lengths in enumerate(prefixes):
            if i in gone_on:
                lengths = [max(lengths)] * len(lengths)  # a batch is padded to its longest sequence
            if lengths:
                self.engines[i].reading += self.rates.read(np.array(lengths))
            self._plan(i)
        return list(range(first, self.submitted))

    def wait(self, numbers: Iterable[int]) -> set[int]:
        numbers = set(numbers)
        while len(there := numbers & self.answers.keys()) < (len(numbers) if self.embedded else min(1, len(numbers))):
            self._advance()
        return there

    def take(self, number: int) -> list[Response]:
        return self.answers.pop(number)

    def abort(self, numbers: Collection[int]) -> None:
        if not numbers:
            return
        for i, engine in enumerate(self.engines):
            self._settle(i)
            engine.reading = 0.0
            self._answer(engine, np.unique(engine.request).tolist())
            self._plan(i)

    def suspend(self, numbers: Collection[int]) -> set[int]:
        self.abort(numbers)
        return set(numbers)

    def train(self, seconds: float) -> None:
        """Keeps the ranks of the actor busy, each for so many seconds on its own core, while engines keep sampling."""
        self.left[-1] = seconds
        while np.isfinite(self.left[-1]):
            self._advance()

    def update_weights(self, version: int) -> None:
        """Gives the engines new weights. Servers pause in the middle of their responses; embedded engines finish their
        batches first."""
        while self.embedded and np.isfinite(self.left).any():
            self._advance()
        self.weight_version = version

    def _advance(self) -> None:
        """Advances the clock to the next event. Busy processes share the cores equally."""
        at_work = np.isfinite(self.left)
        if not at_work.any():
            raise RuntimeError("no engine is working on the requests that are waited for")
        speed = min(1.0, self.cores / (int(at_work[:-1].sum()) + self.ranks * bool(at_work[-1])))
        i = int(self.left.argmin())
        seconds = float(self.left[i])
        self.left -= seconds
        self.now += seconds / speed
        if i == len(self.engines):
            self.left[i] = np.inf
            return
        engine = self.engines[i]
        self._settle(i)
        whole = engine.whole()
        if not self.embedded:
            self._answer(engine, whole)
        elif len(whole) >= engine.quota:
            self._answer(engine, np.unique(engine.request).tolist())
        self._plan(i)

    def _settle(self, i: int) -> None:
        self.engines[i].go_on(float(self.left[i]))

    def _plan(self, i: int) -> None:
        self.left[i] = self.engines[i].plan(self.rates)

    def _answer(self, engine: Engine, numbers: Iterable[int]) -> None:
        self.answers |= {number: engine.remove(number) for number in numbers}


class Prompts:
    """Stands in for the prompts of the training data: gives the lengths of the responses to each."""

    def __init__(self, lengths_of: LengthsOf) -> None:
        self.lengths_of = lengths_of

    def __getitem__(self, row: int) -> Lengths:
        return self.lengths_of(row)


class NoGrader:
    """Gives every response the same score at once."""

    def grade(self, pairs: Sequence[Any]) -> list[RewardResult]:
        return [RewardResult(0.0)] * len(pairs)

    def check(self, graded: Sequence[Any]) -> dict[str, float]:
        return {}


@dataclass(frozen=True, slots=True)
class Step:
    """Times of a step in the driver, in seconds."""

    whole: float
    rollout: float
    """Part of it that the driver waits for engines until the step has its groups."""


def simulate(
    config: Config,
    fleet: Fleet,
    lengths_of: LengthsOf,
    rest: Callable[[int], float],
    steps: int,
) -> list[Step]:
    """Returns the times of the simulated steps.

    `rest`: number of sampled tokens of a step -> seconds of each rank without rollouts.
    """
    cursor, stub = Cursor(2**20, seed=0, shuffle=False), Prompts(lengths_of)
    engines: Any = fleet
    collector = RolloutCollector(
        config,
        engines,
        stub,  # type: ignore[arg-type]
        cursor,
        NoGrader(),
        sampling=lambda step, draw: None,  # type: ignore[arg-type,return-value]
        phase=lambda name: nullcontext(),
    )
    version, found = 0, []
    for step in range(1, steps + 1):
        start = fleet.now
        rollouts = collector.collect(step, version)
        sampled = fleet.now
        fleet.train(rest(sum(len(response) for _, response, _ in rollouts.responses)))
        version += config.train.updates_per_rollout
        fleet.update_weights(version)
        found.append(Step(fleet.now - start, sampled - start))
    return found
