"""CPU seconds and peak memory of token statistics, against the other ways to compute them.

    python benchmarks/token_stats.py                                       # reduced size, a minute or two
    python benchmarks/token_stats.py --tokens 4096 --out benchmarks/results/token_stats_cpu.json

One process a variant, one thread. The variants of a group take turns, one step each a round, and a ratio is the median
over rounds of the ratio within the round, so that a busy machine slows both sides. Memory is the high-water mark of one
step over what stood before it (logits given, weights and so on), in a process that hands freed memory back at once;
time is taken in one that keeps it, as the allocator of an accelerator does. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine

GROUPS = {
    "logits given": ["naive", "naive compiled", "ours, Z on 1 %", "ours, Z on all rows"],
    "with the LM head": [
        "head, naive",
        "head, published passes",
        "head, torch cross-entropy",
        "head, ours, recompute",
        "head, ours, in forward",
        "3 products alone",
        "4 products alone",
    ],
}
# (what, over what, kind, bound): the CPU targets. "time" and "memory" are how often smaller, "cost" is how much larger.
TARGETS = [
    ("naive", "ours, Z on 1 %", "time", 5.0),
    ("naive", "ours, Z on 1 %", "memory", 150.0),
    ("naive", "ours, Z on all rows", "time", 3.0),
    ("head, ours, in forward", "3 products alone", "cost", 1.12),
    ("head, ours, recompute", "4 products alone", "cost", 1.12),
]
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def work(variant: str, tokens: int, vocab: int, width: int, dtype: str) -> None:
    """One variant: a step for each line on standard input, what it cost as a line of JSON on standard output."""
    import torch
    from token_stats_variants import VARIANTS, Problem

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    refill, step = VARIANTS[variant](Problem.random(tokens, vocab, width, getattr(torch, dtype)))
    refill()
    step()
    for _ in sys.stdin:
        refill()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, used, started = status_bytes("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = step()
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        peak = status_bytes("VmHWM") - before
        print(json.dumps({"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": peak, "loss": loss}), flush=True)


class Worker:
    def __init__(self, variant: str, arguments: argparse.Namespace, allocator: dict[str, str]) -> None:
        sizes = [str(value) for value in (arguments.tokens, arguments.vocab, arguments.width, arguments.dtype)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", variant, *sizes],
            env=os.environ | allocator | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def measure(variants: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for variant in variants:
        worker = Worker(variant, arguments, HAND_BACK)
        step = worker.step()
        results[variant] = {"peak_mib": step["peak_bytes"] / 2**20, "loss": step["loss"], "rounds": []}
        worker.close()
    workers = {variant: Worker(variant, arguments, KEEP) for variant in variants}
    for _ in range(arguments.rounds):
        for variant, worker in workers.items():
            step = worker.step()
            results[variant]["rounds"].append({name: step[name] for name in ("cpu_seconds", "wall_seconds")})
    for worker in workers.values():
        worker.close()
    for result in results.values():
        result["cpu_seconds"] = statistics.median(step["cpu_seconds"] for step in result["rounds"])
    return results


def ratio(results: dict[str, Any], over: str, under: str, kind: str) -> float:
    if kind == "memory":
        return results[over]["peak_mib"] / results[under]["peak_mib"]
    rounds = zip(results[over]["rounds"], results[under]["rounds"], strict=True)
    return statistics.median(above["cpu_seconds"] / below["cpu_seconds"] for above, below in rounds)


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    verdicts = []
    for over, under, kind, bound in TARGETS:
        value = ratio(results, over, under, kind)
        met = value <= bound if kind == "cost" else value >= bound
        verdicts.append({"of": over, "over": under, "kind": kind, "value": value, "target": bound, "met": met})
    return verdicts


def show(results: dict[str, Any], verdicts: list[dict[str, Any]]) -> None:
    print(f"{'variant':28}{'CPU s':>10}{'peak MiB':>12}")
    for variant, result in results.items():
        print(f"{variant:28}{result['cpu_seconds']:10.3f}{result['peak_mib']:12.0f}")
    for verdict in verdicts:
        sign = "<=" if verdict["kind"] == "cost" else ">="
        print(
            f"{verdict['kind']:7} {verdict['of']} / {verdict['over']}: {verdict['value']:.2f} "
            f"(target {sign} {verdict['target']:g}: {'met' if verdict['met'] else 'missed'})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="where to write the results as JSON")
    arguments = parser.parse_args()
    load, started, where = os.getloadavg(), time.strftime("%Y-%m-%d %H:%M:%S"), machine()
    results: dict[str, Any] = {}
    for variants in GROUPS.values():
        results |= measure(variants, arguments)
    verdicts = judge(results)
    show(results, verdicts)
    if arguments.out is not None:
        settings = {name: getattr(arguments, name) for name in ("tokens", "vocab", "width", "dtype", "rounds")}
        record = {
            "benchmark": "token_stats",
            "started": started,
            "machine": where,
            "load_average": {"before": load, "after": os.getloadavg()},
            "settings": settings | {"threads": 1},
            "ratios": verdicts,
            "variants": results,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        main()
