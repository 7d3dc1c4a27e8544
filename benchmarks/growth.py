"""How the processor time of a step's own work grows with tokens, ranks and engines.

    python benchmarks/growth.py [--out benchmarks/results/growth.json] [--picture docs/growth.svg]
    python benchmarks/growth.py --from benchmarks/results/growth.json --picture docs/growth.svg    # only draws

Tokens: a step of the driver on made-up answers (`driver.py`), from 1 thousand to 16 million response tokens. Ranks: the
same step at 1 million tokens with answers from 1 to 512 ranks, and the partition of 32 sequences per rank. Engines: the
orders of a weight sync of Qwen3-30B-A3B (18,867 tensors) to 1 to 64 engines, and the simulated clock with 8 groups per
engine (`scaling_simulator.py`), which calls the product's collector. Engines, actor and grader take no time.

Each line is fitted by a power of its work (tokens, sequences or orders) over its upper half, where fixed costs no
longer hide the growth. An exponent of at most 1.15 counts as growing no faster than the work: caches that overflow and
sorting add some hundredths. Every size has a process of its own with one thread, and the fewest processor seconds of
two count.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import driver
from benchmarks.machine import arguments, keep

TOKENS = [2**10, 2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24]
RANKS = [1, 4, 16, 64, 256, 512]
ENGINES = [1, 2, 4, 8, 16, 32, 64]
MEAN, FIXED_TOKENS, PER_RANK, GROUPS = 1024, 2**20, 32, 8
REPEATS, LIMIT, TOO_SHORT = 2, 1.15, 1e-3
TERMS = {
    "driver, all phases": None,
    "selection": ("select", "selection overlap"),
    "batching": ("batch",),
    "update and scores": ("update", "score"),
}
"""Line -> phases of `driver.py`."""


def driver_step(tokens: int, ranks: int) -> dict[str, float]:
    responses = max(2 * driver.SAMPLES, tokens // MEAN // (2 * driver.SAMPLES) * 2 * driver.SAMPLES)
    driver.RANKS = ranks
    with tempfile.TemporaryDirectory() as folder:
        driver.write_answers(Path(folder), responses, tokens / responses)
        step = driver.step(responses, tokens / responses, Path(folder))
    found = {"driver, all phases": step["seconds"]}
    for name, phases in TERMS.items():
        if phases:
            found[name] = sum(step["phases"][phase]["seconds"] for phase in phases)
    return found


def partition_over(ranks: int) -> dict[str, float]:
    from benchmarks.batching import BUDGET, draw
    from megatron_rl.batching.balance import row_costs
    from megatron_rl.batching.partition import partition

    tokens = draw(PER_RANK * ranks, 0.6, 0)
    return {
        "partition": seconds(
            lambda: partition(tokens.tolist(), ranks, token_budget=BUDGET, costs=row_costs(tokens, 1e4))
        )
    }


def orders_to(engines: int) -> dict[str, float]:
    """The driver's orders of a weight sync: the update is pickled once, and each engine gets a reference to it."""
    from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs
    from megatron_rl.weight_sync.transport import CollectiveUpdate, StageBuckets

    specs = [
        TensorSpec(f"model.layers.{i // 393}.mlp.experts.{i % 393}.w", "bfloat16", (768, 2048)) for i in range(18867)
    ]
    update = CollectiveUpdate(1, (StageBuckets("s0", bucket_specs(specs, 2**29)),))
    return {"weight sync's orders": seconds(lambda: [pickle.dumps(update, 5), *map(pickle.dumps, range(engines))])}


def simulated_step(engines: int) -> dict[str, float]:
    from benchmarks.scaling import log_normal
    from benchmarks.scaling_check import MODES, QUICKSTART
    from benchmarks.scaling_simulator import Fleet, Rates, simulate
    from megatron_rl.config import load_config

    config = load_config(QUICKSTART, [*MODES["synchronous"], f"rollout.prompts_per_step={GROUPS * engines}"])
    rates = Rates(lambda rows, before: 1e-2, lambda prefixes: 0.0, 200.0)
    return {
        "simulated rollouts": seconds(
            lambda: simulate(config, Fleet(engines, rates), log_normal(8), lambda tokens: 1.0, 2)
        )
    }


def seconds(work: Callable[[], Any]) -> float:
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


SWEEPS: dict[str, tuple[list[int], Callable[[int], dict[str, float]]]] = {
    "response tokens": (TOKENS, lambda size: driver_step(size, 8)),
    "ranks": (RANKS, lambda size: driver_step(FIXED_TOKENS, size) | partition_over(size)),
    "engines": (ENGINES, lambda size: orders_to(size) | simulated_step(size)),
}


def exponent(sizes: list[int], times: list[float]) -> float:
    """Returns the slope of log time over log size in the upper half of the sizes."""
    half = len(sizes) // 2
    x, y = np.log(sizes[half:]), np.log(np.maximum(times[half:], TOO_SHORT))
    return float(np.polyfit(x, y, 1)[0])


def measure(sweep: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", sweep, str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(REPEATS)
    ]
    found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    return {name: min(run[name] for run in found) for name in found[0]}


def show(sweeps: dict[str, Any]) -> None:
    table = Table("over", "line", "smallest s", "largest s", "exponent", "")
    for sweep, found in sweeps.items():
        for name, times in found["seconds"].items():
            power = found["exponents"][name]
            verdict = "no faster" if power <= LIMIT else "[red]faster[/]"
            table.add_row(sweep, name, f"{times[0]:.3g}", f"{times[-1]:.3g}", f"{power:.2f}", verdict)
    Console().print(table)


def picture(sweeps: dict[str, Any], path: Path) -> None:
    """Draws the lines in colours that are legible on white and on black; the background is transparent."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    grey = "#808080"
    style = {"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9, "text.color": grey}
    style |= {f"{axis}.{part}": grey for axis in ("xtick", "ytick") for part in ("color", "labelcolor")}
    style |= {"axes.labelcolor": grey, "axes.edgecolor": grey, "axes.titlecolor": grey}
    colours = ["#5b8bd0", "#d08c2f", "#4f9d69", "#c65b70", "#9a78c4"]
    with plt.rc_context(style):
        figure, (panels,) = plt.subplots(
            1, len(sweeps), figsize=(10, 3.6), sharey=True, layout="constrained", squeeze=False
        )
        for axes, (sweep, found) in zip(panels, sweeps.items(), strict=True):
            sizes = found["sizes"]
            for colour, (name, times) in zip(colours, found["seconds"].items(), strict=False):
                shown = [max(value, TOO_SHORT) for value in times]
                label = f"{name} ({found['exponents'][name]:.2f})"
                axes.plot(sizes, shown, color=colour, marker="o", ms=3, label=label)
            top = max(times[-1] for times in found["seconds"].values())
            axes.plot(
                sizes, [2 * top * size / sizes[-1] for size in sizes], color=grey, linestyle=":", label="as the work"
            )
            axes.set(xlabel=sweep, xscale="log", yscale="log", ylim=(TOO_SHORT / 2, None))
            axes.grid(color=grey, alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=7)
        panels[0].set_ylabel("processor seconds of a step")
        figure.savefig(path, metadata={"Date": None, "Creator": None}, transparent=True)
        plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--picture", type=Path, default=None, help="where to draw the lines as SVG")
    parser.add_argument("--from", dest="kept", type=Path, default=None, help="a kept result for what is not measured")
    parser.add_argument("--over", nargs="*", choices=SWEEPS, default=None, help="what to measure; with --from: nothing")
    options = parser.parse_args()
    sweeps = json.loads(options.kept.read_text())["sweeps"] if options.kept else {}
    wanted = options.over if options.over is not None else [] if options.kept else list(SWEEPS)
    if wanted:
        for sweep in wanted:
            sizes = SWEEPS[sweep][0]
            rows = [measure(sweep, size) for size in sizes]
            times = {name: [row[name] for row in rows] for name in rows[0]}
            powers = {name: exponent(sizes, values) for name, values in times.items()}
            sweeps[sweep] = {"sizes": sizes, "seconds": times, "exponents": powers}
        keep(options.out, "growth", limit=LIMIT, sweeps=sweeps)
    show(sweeps)
    if options.picture:
        picture(sweeps, options.picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(SWEEPS[sys.argv[2]][1](int(sys.argv[3]))))
    else:
        main()
