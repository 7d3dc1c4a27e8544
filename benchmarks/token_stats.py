"""CPU seconds and peak memory of token statistics, compared with other implementations.

    python benchmarks/token_stats.py                                       # reduced size, a minute or two
    python benchmarks/token_stats.py --tokens 4096 --out benchmarks/results/token_stats_cpu.json
    python benchmarks/token_stats.py --tokens 512 --groups "entropy terms" "entropy terms with the LM head" \\
        --out benchmarks/results/entropy_terms_cpu.json                    # what TRE and an entropy bonus cost
    python benchmarks/token_stats.py --device cuda --tokens 8192 --vocab 151936 --width 5120 --dtype bfloat16

Variants that cannot run here (Liger's kernels without CUDA) are listed with the reason.

Each variant has one process with one thread. The variants of a group take turns, one step each per round. A ratio is
the median over rounds of the ratio within a round, so that a busy machine slows both sides. Memory is the peak of one
step above the memory in use before (given logits, weights and so on), in a process that returns freed memory at once.
Time is measured in a process that keeps freed memory, as the allocator of an accelerator does. On CUDA: wall seconds up
to a synchronisation, and the allocator's peak. Linux only.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine
from benchmarks.token_stats_variants import ENTROPY_TERMS, why_not

GROUPS = {
    "logits given": ["naive", "naive compiled", "Liger, cross-entropy", "ours, Z on 1 %", "ours, Z on all rows"],
    "with the LM head": [
        "head, naive",
        "head, published passes",
        "head, torch cross-entropy",
        "head, Liger, cross-entropy",
        "head, Liger, chunked GRPO",
        "head, TRL",
        "head, ours, recompute",
        "head, ours, in forward",
        "3 products alone",
        "4 products alone",
    ],
    "entropy terms": list(ENTROPY_TERMS),
    "entropy terms with the LM head": [f"head, {name}" for name in ENTROPY_TERMS],
}
ALWAYS = ("logits given", "with the LM head")
"""The groups that are measured unless others are asked for."""
# (variant, other variant, kind, bound). "time" and "memory": the ratio must be at least the bound; "cost": at most.
TARGETS_AT = {"tokens": 4096, "vocab": 32768, "width": 512, "dtype": "float32", "device": "cpu"}
TARGETS = [
    ("naive", "ours, Z on 1 %", "time", 5.0),
    ("naive", "ours, Z on 1 %", "memory", 150.0),
    ("naive", "ours, Z on all rows", "time", 3.0),
    ("head, ours, in forward", "3 products alone", "cost", 1.12),
    ("head, ours, recompute", "4 products alone", "cost", 1.12),
]
RATIOS = [
    (f"{head}{name}", f"{head}no entropy term", "cost") for head in ("", "head, ") for name in list(ENTROPY_TERMS)[1:]
]
"""Ratios without a target: what an entropy term costs on top of log-probs and the entropy as a metric."""
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def start_peak(device: str) -> int:
    """Resets the peak of memory, and returns the bytes in use."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        return status_bytes("VmRSS")
    synchronise(device)
    import torch

    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes(device: str) -> int:
    if device == "cpu":
        return status_bytes("VmHWM")
    import torch

    return torch.cuda.max_memory_allocated()


def work(variant: str, tokens: int, vocab: int, width: int, dtype: str, device: str) -> None:
    """Runs one variant: a step per line on standard input, its cost as a line of JSON on standard output."""
    import torch
    from token_stats_variants import VARIANTS, Problem

    torch.set_num_threads(1)
    refill, step = VARIANTS[variant](Problem.random(tokens, vocab, width, getattr(torch, dtype), device))
    torch.set_flush_denormal(True)  # after the imports: numpy looks for denormals and warns when there are none
    refill()
    step()
    for _ in sys.stdin:
        refill()
        before = start_peak(device)
        used, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loss = step()
        synchronise(device)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        peak = peak_bytes(device) - before
        print(json.dumps({"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": peak, "loss": loss}), flush=True)


class Worker:
    def __init__(self, variant: str, arguments: argparse.Namespace, allocator: dict[str, str]) -> None:
        sizes = [str(getattr(arguments, name)) for name in ("tokens", "vocab", "width", "dtype", "device")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", variant, *sizes],
            # Denormals are flushed to zero on purpose; numpy would warn.
            env=os.environ | allocator | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::UserWarning"},
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


def measure(variants: list[str], arguments: argparse.Namespace, advance: Callable[[], None]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for variant in variants:
        worker = Worker(variant, arguments, HAND_BACK)
        step = worker.step()
        results[variant] = {"peak_mib": step["peak_bytes"] / 2**20, "loss": step["loss"], "rounds": []}
        worker.close()
        advance()
    workers = {variant: Worker(variant, arguments, KEEP) for variant in variants}
    for _ in range(arguments.rounds):
        for variant, worker in workers.items():
            step = worker.step()
            results[variant]["rounds"].append({name: step[name] for name in ("cpu_seconds", "wall_seconds")})
            advance()
    for worker in workers.values():
        worker.close()
    for result in results.values():
        for name in ("cpu_seconds", "wall_seconds"):
            result[name] = statistics.median(step[name] for step in result["rounds"])
    return results


def ratio(results: dict[str, Any], over: str, under: str, kind: str) -> float:
    if kind == "memory":
        return results[over]["peak_mib"] / results[under]["peak_mib"]
    rounds = zip(results[over]["rounds"], results[under]["rounds"], strict=True)
    return statistics.median(above["cpu_seconds"] / below["cpu_seconds"] for above, below in rounds)


def judge(results: dict[str, Any], sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the ratios and, at the sizes that the targets are for, whether they meet the targets."""
    verdicts = []
    for over, under, kind, bound in TARGETS:
        if over not in results:
            continue
        value = ratio(results, over, under, kind)
        verdict = {"of": over, "over": under, "kind": kind, "value": value}
        if all(sizes[name] == size for name, size in TARGETS_AT.items()):
            verdict |= {"target": bound, "met": value <= bound if kind == "cost" else value >= bound}
        verdicts.append(verdict)
    verdicts += [
        {"of": over, "over": under, "kind": kind, "value": ratio(results, over, under, kind)}
        for over, under, kind in RATIOS
        if over in results
    ]
    return verdicts


def show(results: dict[str, Any], not_run: dict[str, str], verdicts: list[dict[str, Any]], device: str) -> None:
    time_name, heading = ("cpu_seconds", "CPU s") if device == "cpu" else ("wall_seconds", "wall s")
    print(f"{'variant':28}{heading:>10}{'peak MiB':>12}")
    for variant in (variant for variants in GROUPS.values() for variant in variants):
        if variant in not_run:
            print(f"{variant:28}  not run: {not_run[variant]}")
        elif variant in results:
            print(f"{variant:28}{results[variant][time_name]:10.3f}{results[variant]['peak_mib']:12.0f}")
    for verdict in verdicts:
        line = f"{verdict['kind']:7} {verdict['of']} / {verdict['over']}: {verdict['value']:.2f}"
        if "target" in verdict:
            sign = "<=" if verdict["kind"] == "cost" else ">="
            line += f" (target {sign} {verdict['target']:g}: {'met' if verdict['met'] else 'missed'})"
        print(line)
    if any(verdict["of"] == TARGETS[0][0] and "target" not in verdict for verdict in verdicts):
        print(f"no verdict: the targets are for {', '.join(f'{name} {size}' for name, size in TARGETS_AT.items())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=ALWAYS, help="the groups to measure")
    parser.add_argument("--out", type=Path, default=None, help="where to write the results as JSON")
    arguments = parser.parse_args()
    load, started, where = os.getloadavg(), time.strftime("%Y-%m-%d %H:%M:%S"), machine()
    reasons = {name: why_not(name, arguments.device) for group in arguments.groups for name in GROUPS[group]}
    not_run = {name: reason for name, reason in reasons.items() if reason is not None}
    results: dict[str, Any] = {}
    with Progress() as progress:
        task = progress.add_task("measuring", total=(len(reasons) - len(not_run)) * (1 + arguments.rounds))
        for variants in map(GROUPS.__getitem__, arguments.groups):
            possible = [variant for variant in variants if variant not in not_run]
            results |= measure(possible, arguments, lambda: progress.advance(task))
    verdicts = judge(results, vars(arguments)) if arguments.device == "cpu" else []
    show(results, not_run, verdicts, arguments.device)
    if arguments.out is not None:
        names = ("tokens", "vocab", "width", "dtype", "device", "rounds")
        settings = {name: getattr(arguments, name) for name in names}
        record = {
            "benchmark": "token_stats",
            "started": started,
            "machine": where,
            "load_average": {"before": load, "after": os.getloadavg()},
            "settings": settings | {"threads": 1},
            "ratios": verdicts,
            "variants": results,
            "not_run": not_run,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6], sys.argv[7])
    else:
        main()
