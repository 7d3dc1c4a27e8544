"""A step's time against nodes, 1 to 64, for synchronous, over-sampled, partial and asynchronous rollouts: a simulation.

    python benchmarks/scaling.py [--out benchmarks/results/scaling.json] [--plot runs/benchmarks/scaling.html]

Qwen3-14B by the paper's recipe (2,048 responses a step, of log-normal lengths up to 8,192), half of each node's eight
H100 the actor's (TP 4), half two engines' (TP 2). What a decoding step and the rest of a step take is `megatron-rl
plan`'s model; here engines decode response by response, and steps follow one another:

synchronous     every engine decodes its part until the longest response of all has ended; then training
over-sampled    a quarter more is started; when enough groups are whole, the others are thrown away
partial         the same, but the others go on in the next step where they stopped
asynchronous    partial, and engines go on while the actor trains, at most one step ahead

Nothing here has run on a cluster. That steps follow one another as simulated is checked against real processes, one to
four of them, that sleep as long as a decoding step takes (`--check`).
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.batching import LIMIT, MEAN, PROMPT
from benchmarks.machine import arguments, keep
from megatron_rl.config import load_config
from megatron_rl.plan.engines import decoding_seconds, engine_memory
from megatron_rl.plan.hardware import GPUS, Assumptions
from megatron_rl.plan.lengths import lengths
from megatron_rl.plan.setup import Setup
from megatron_rl.plan.times import step_seconds

RECIPE = Path("examples/recipes/qwen3-14b/lp_reg_paper_on.yaml")
MODEL = "model.path=tests/fixtures/models/Qwen3-14B-Base"
NODES, SCHEDULES = (1, 2, 4, 8, 16, 32, 64), ("synchronous", "over-sampled", "partial", "asynchronous")
GROUPS, SAMPLES, SPREAD, STEPS, SURPLUS = 256, 8, 0.6, 6, 1.25
STRIDE = 64
"""Tokens decoded between two looks at who has ended."""

Decode = Callable[[int, float], float]
"""(responses together, mean tokens before the next) -> seconds of a decoding step."""


@dataclass
class Group:
    """Responses to one prompt."""

    length: np.ndarray
    done: np.ndarray
    """Tokens so far, of each."""

    @classmethod
    def drawn(cls, random: np.random.Generator, limit: int, spread: float, mean: float) -> Group:
        middle = float(np.median(lengths(mean, spread, limit).values))
        length = np.minimum(limit, np.exp(np.log(middle) + spread * random.standard_normal(SAMPLES))).astype(int) + 1
        return cls(length, np.zeros(SAMPLES, dtype=int))

    @property
    def whole(self) -> bool:
        return bool((self.done >= self.length).all())


@dataclass
class Engine:
    groups: list[Group]
    clock: float = 0.0

    def stride(self, decode: Decode, tokens: int) -> float:
        """Decode so many tokens of every response that goes on; returns the seconds."""
        alive = [g.done[g.done < g.length] for g in self.groups]
        count, before = sum(map(len, alive)), sum(float(part.sum()) for part in alive)
        if not count:
            return np.inf
        seconds = tokens * decode(count, PROMPT + before / count)
        for group in self.groups:
            group.done = np.minimum(group.done + tokens, group.length)
        return seconds


def roll_out(engines: list[Engine], wanted: int, decode: Decode, tokens: int) -> tuple[float, list[Group]]:
    """Engines go on side by side until `wanted` groups are whole: seconds, and those groups, which leave them."""
    for engine in engines:
        engine.clock = 0.0
    seconds, ready, order = 0.0, 0, [(0.0, i) for i in range(len(engines))]
    while ready < wanted:
        _, i = heapq.heappop(order)  # the one that is furthest behind
        engine, before = engines[i], sum(group.whole for group in engines[i].groups)
        if not np.isfinite(took := engine.stride(decode, tokens)):
            continue  # all of its responses have ended
        engine.clock += took
        seconds = max(seconds, engine.clock)
        ready += sum(group.whole for group in engine.groups) - before
        heapq.heappush(order, (engine.clock, i))
    whole = [group for engine in engines for group in engine.groups if group.whole][:wanted]
    taken = {id(group) for group in whole}
    for engine in engines:
        engine.groups = [group for group in engine.groups if id(group) not in taken]
    return seconds, whole


def simulate(
    schedule: str,
    engines: int,
    draw: Callable[[], Group],
    groups: int,
    decode: Decode,
    rest: float,
    tokens: int = STRIDE,
) -> float:
    """Mean seconds of a step, the first two left out; rest: what a step takes besides its rollouts."""
    running = [Engine([]) for _ in range(engines)]
    times: list[float] = []
    for _ in range(STEPS):
        if schedule in ("synchronous", "over-sampled"):
            for engine in running:
                engine.groups = []
        started = groups if schedule == "synchronous" else round(SURPLUS * groups)
        for _ in range(started - sum(len(engine.groups) for engine in running)):
            min(running, key=lambda engine: len(engine.groups)).groups.append(draw())
        seconds, _ = roll_out(running, groups, decode, tokens)
        if schedule == "asynchronous":
            times.append(max(rest, seconds) if times else rest + seconds)
        else:
            times.append(seconds + rest)
    return float(np.mean(times[2:]))


def setup_of(nodes: int) -> Setup:
    halves = ["actor.tensor_parallel=4", "rollout.server.tensor_parallel=2", "cluster.colocate=false"]
    sizes = [f"cluster.nodes={nodes}", f"actor.data_parallel={nodes}", f"rollout.engines={2 * nodes}"]
    return Setup.of(load_config(RECIPE, [MODEL, *halves, *sizes]), GPUS["h100"], Assumptions(PROMPT, MEAN, SPREAD))


def cluster_times(nodes: int) -> dict[str, float]:
    setup = setup_of(nodes)
    memory = engine_memory(setup)
    rest = sum(seconds for part, seconds in step_seconds(setup).items() if part != "rollout")

    def decode(together: int, context: float) -> float:
        turns = max(1.0, together * context / memory.tokens)  # where the cache holds fewer, they take turns
        return turns * decoding_seconds(setup, memory, together / turns, context)

    found = {}
    for schedule in SCHEDULES:
        random = np.random.default_rng(0)
        found[schedule] = simulate(
            schedule, 2 * nodes, lambda r=random: Group.drawn(r, LIMIT, SPREAD, MEAN), GROUPS, decode, rest
        )
    return found | {"rest": rest}


# ---------------------------------------------------------------------- the check

TOKEN, CHECK_TOKENS, CHECK_GROUPS, CHECK_REST = 0.02, 4, 8, 0.5


def small_decode(together: int, context: float) -> float:
    """Seconds of a decoding step in the check: a part for each response."""
    return TOKEN * (0.5 + together / 64)


def small_group(random: np.random.Generator) -> Group:
    return Group.drawn(random, 48, SPREAD, 16.0)


def decode_for_real(engine: Engine) -> Engine:
    """In a process of its own: a stride of one engine, which takes as long as it says."""
    time.sleep(min(10.0, engine.stride(small_decode, CHECK_TOKENS)))
    return engine


def really(schedule: str, engines: int) -> float:
    """The mean seconds of a step of processes that sleep, as `simulate` says it."""
    random = np.random.default_rng(1)
    running, times = [Engine([]) for _ in range(engines)], []
    with ProcessPoolExecutor(engines) as pool:
        list(pool.map(time.sleep, [0.1] * engines))
        for _ in range(STEPS):
            start = time.perf_counter()
            if schedule in ("synchronous", "over-sampled"):
                for engine in running:
                    engine.groups = []
            started = CHECK_GROUPS if schedule == "synchronous" else round(SURPLUS * CHECK_GROUPS)
            for _ in range(started - sum(len(engine.groups) for engine in running)):
                min(running, key=lambda engine: len(engine.groups)).groups.append(small_group(random))
            training = pool_free_sleep(CHECK_REST) if schedule == "asynchronous" and times else None
            waiting = {i: pool.submit(decode_for_real, engine) for i, engine in enumerate(running)}
            while sum(group.whole for engine in running for group in engine.groups) < CHECK_GROUPS:
                for i in [i for i, future in waiting.items() if future.done()]:
                    running[i] = waiting.pop(i).result()
                    if not all(group.whole for group in running[i].groups):
                        waiting[i] = pool.submit(decode_for_real, running[i])
                time.sleep(0.001)
            for i, future in waiting.items():
                running[i] = future.result()
            whole = [group for engine in running for group in engine.groups if group.whole][:CHECK_GROUPS]
            taken = {id(group) for group in whole}
            for engine in running:
                engine.groups = [group for group in engine.groups if id(group) not in taken]
            if training is None:
                time.sleep(CHECK_REST)
            else:
                training()
            times.append(time.perf_counter() - start)
    return float(np.mean(times[2:]))


def pool_free_sleep(seconds: float) -> Callable[[], None]:
    """Begins now; the result waits for what is left of it."""
    end = time.perf_counter() + seconds
    return lambda: time.sleep(max(0.0, end - time.perf_counter()))


def check() -> list[dict[str, Any]]:
    found = []
    for engines in (1, 2, 4):
        for schedule in SCHEDULES:
            random = np.random.default_rng(1)
            said = simulate(
                schedule,
                engines,
                lambda r=random: small_group(r),
                CHECK_GROUPS,
                small_decode,
                CHECK_REST,
                CHECK_TOKENS,
            )
            measured = really(schedule, engines)
            found.append({"processes": engines, "schedule": schedule, "simulated": said, "measured": measured})
    return found


def plot(found: dict[int, dict[str, float]], path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for schedule in SCHEDULES:
        figure.add_scatter(x=list(found), y=[times[schedule] for times in found.values()], name=schedule)
    figure.add_scatter(x=list(found), y=[t["rest"] for t in found.values()], name="all but rollouts", line_dash="dot")
    figure.update_layout(title="Seconds of a step, Qwen3-14B, 2,048 responses (simulated)", template="plotly_white")
    figure.update_xaxes(title="nodes of 8 H100", type="log", tickvals=list(found))
    figure.update_yaxes(title="seconds", type="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, default=Path("runs/benchmarks/scaling.html"))
    parser.add_argument("--check", action="store_true", help="also against processes that sleep (two minutes)")
    options = parser.parse_args()
    found = {nodes: cluster_times(nodes) for nodes in NODES}
    table = Table("nodes", *SCHEDULES, "all but rollouts", title="seconds of a step, simulated", title_justify="left")
    for nodes, times in found.items():
        table.add_row(str(nodes), *(f"{times[name]:.0f}" for name in (*SCHEDULES, "rest")))
    console = Console()
    console.print(table)
    plot(found, options.plot)
    checked = check() if options.check else []
    for row in checked:
        seconds = f"simulated {row['simulated']:.2f} s, measured {row['measured']:.2f} s a step"
        off = row["measured"] / row["simulated"] - 1
        console.print(f"{row['processes']} processes, {row['schedule']}: {seconds}, {off:+.0%}", highlight=False)
    settings = {"recipe": str(RECIPE), "groups": GROUPS, "surplus": SURPLUS, "spread": SPREAD, "mean": MEAN}
    keep(options.out, "scaling", settings=settings, nodes=found, check=checked)


if __name__ == "__main__":
    main()
