"""How evenly a step's work is partitioned, and how much of it is padding, for realistic distributions of lengths.

    python benchmarks/batching.py [--out benchmarks/results/batching.json]

Response lengths are log-normal, cut off at 8,192 (mean 2,700; spread: standard deviation of the logarithm). Prompt
lengths are log-normal around 200. Each case has twenty draws; the table shows the median and the worst. The partition
is the actor's (`partition` with packed sequences and the actor's cost of a sequence, attention included) for Qwen3-14B.

imbalance: cost of the most expensive replica over the mean, less one: the time that an average replica waits, relative
to its own work. It is never less than `bound`, as no partition is better than the mean or the longest sequence alone.
padding: share of padding among the positions that go through the model, at sequence parallelism 4.
in order: imbalance with equal numbers of sequences per replica, in the order in which they come.
side by side: padding of sequences side by side, each padded to the longest of its micro-batch.
The results do not depend on the machine: nothing but the partition itself is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.batching.balance import row_costs
from megatron_rl.batching.partition import MicroBatches, partition
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config

MODEL = Path("tests/fixtures/models/Qwen3-14B-Base")
LIMIT, MEAN, PROMPT, DRAWS = 8192, 2700.0, 200.0, 20
SPREADS = (0.6, 1.0)
BUDGET, MULTIPLE = 16384, 4
CASES = [(rows, ranks) for rows in (256, 512, 2048) for ranks in (8, 16, 32, 64)]
"""(responses per update, replicas); the recipes have 2,048 responses in one update, or 512 in each of four."""
IMBALANCE, PADDING = 0.05, 0.03


def draw(rows: int, spread: float, seed: int) -> np.ndarray:
    """Returns [rows], lengths of prompts with their responses."""
    from megatron_rl.plan.assumptions import lengths

    random = np.random.default_rng(seed)
    middle = np.median(lengths(MEAN, spread, LIMIT).values)
    responses = np.minimum(LIMIT, np.exp(np.log(middle) + spread * random.standard_normal(rows)))
    prompts = np.minimum(2048, PROMPT * np.exp(0.5 * random.standard_normal(rows)))
    return np.ceil(responses).astype(np.int64) + np.ceil(prompts).astype(np.int64)


def over_mean(costs: list[float]) -> float:
    return max(costs) / (sum(costs) / len(costs)) - 1


def case(tokens: np.ndarray, ranks: int, even_length: float) -> dict[str, float]:
    costs = row_costs(tokens, even_length)
    shares = partition(tokens.tolist(), ranks, token_budget=BUDGET, costs=costs)
    by_rank = [float(sum(costs[rows].sum() for rows in share if rows)) for share in shares]
    in_order = np.array_split(np.arange(len(tokens)), ranks)
    return {
        "imbalance": over_mean(by_rank),
        "bound": max(0.0, float(costs.max()) / (float(costs.sum()) / ranks) - 1),
        "padding": packed_padding(tokens, shares),
        "micro_batches": statistics.mean(len(share) for share in shares),
        "imbalance_in_order": over_mean([float(costs[rows].sum()) for rows in in_order]),
        "padding_side_by_side": side_by_side(tokens, in_order),
    }


def packed_padding(tokens: np.ndarray, shares: list[MicroBatches]) -> float:
    real = sum(int((tokens[rows] - 1).sum()) for share in shares for rows in share)
    run = sum(-(-int((tokens[rows] - 1).sum()) // MULTIPLE) * MULTIPLE for share in shares for rows in share)
    return 1 - real / run


def side_by_side(tokens: np.ndarray, parts: list[np.ndarray]) -> float:
    """Returns the share of padding in micro-batches of as many sequences as fit into the budget at the largest possible
    length, each padded to its longest."""
    count, run = max(1, BUDGET // LIMIT), 0
    for part in parts:
        for first in range(0, len(part), count):
            rows = part[first : first + count]
            run += len(rows) * int(tokens[rows].max())
    return 1 - int(tokens.sum()) / run


def measure() -> list[dict[str, Any]]:
    even = Architecture.from_hf(read_config(MODEL)).even_length
    found = []
    for spread, (rows, ranks) in product(SPREADS, CASES):
        draws = [case(draw(rows, spread, seed), ranks, even) for seed in range(DRAWS)]
        row: dict[str, Any] = {"spread": spread, "rows": rows, "replicas": ranks}
        for name in draws[0]:
            values = [each[name] for each in draws]
            row |= {name: statistics.median(values), f"{name}_worst": max(values)}
        row["met"] = row["imbalance_worst"] <= IMBALANCE and row["padding_worst"] <= PADDING
        found.append(row)
    return found


def show(found: list[dict[str, Any]], seconds: float) -> None:
    table = Table(title=f"{DRAWS} draws each, median (worst)", title_justify="left")
    for name in ("spread", "rows", "DP", "imbalance", "padding", "in order", "side by side", "targets"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        of = (str(row[name]) for name in ("spread", "rows", "replicas"))
        others = (f"{row[name]:.0%}" for name in ("padding", "imbalance_in_order", "padding_side_by_side"))
        imbalance = f"{row['imbalance']:.1%} ({row['imbalance_worst']:.1%})"
        table.add_row(*of, imbalance, *others, "met" if row["met"] else "missed")
    Console().print(table, f"partitioning 2,048 sequences over 64 replicas takes {seconds * 1e3:.0f} ms")


def main() -> None:
    options = arguments(__doc__).parse_args()
    found = measure()
    tokens, start = draw(2048, SPREADS[0], 0), time.process_time()
    partition(tokens.tolist(), 64, token_budget=BUDGET, costs=row_costs(tokens, 1e4))
    seconds = time.process_time() - start
    show(found, seconds)
    settings = {"limit": LIMIT, "mean": MEAN, "draws": DRAWS, "budget": BUDGET, "multiple": MULTIPLE}
    keep(options.out, "batching", settings=settings, cases=found, seconds=seconds)


if __name__ == "__main__":
    main()
