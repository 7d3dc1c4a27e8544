"""The cost of HTTP: the same engine called in this process and as a server, on the quickstart's rollouts.

    .venv-engines/bin/python benchmarks/http_engine.py MODEL [--out benchmarks/results/http_engine.json]

MODEL: the same as for benchmarks/embedded_engine.py. The engine is vLLM, in the environment of `make engines`: once as
vLLM's own `LLM` in this process (with its core in a separate process, as always), once as a server behind `HttpEngine`,
both with the server's settings. A call has 16 prompts, 8 responses each, at most 46 tokens, with all log-probs. Both
take turns, pair after pair, on the same prompts, which are repeated with other random numbers. The result is the ratio
of seconds per token within a pair (median and quartiles). A call takes a tenth of a second, so every other process that
wakes up shows in it; the median is reproducible only with this many pairs. While one takes its turn, the worker of the
other is stopped (SIGSTOP): it would poll for a second after its last token and take a core from the first. The time is
wall time, so use a quiet machine. CPU seconds per token, of all processes, are kept too: other programs disturb them
less, but they include polling.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.machine import arguments, keep
from megatron_rl.data.countdown import write_task
from megatron_rl.data.rows import read_rows
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.vllm.kind import KIND
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.types import SamplingParams

PROMPTS, RESPONSES, TOKENS, CONTEXT = 16, 8, 46, 64
PAIRS, WARM_UP = 200, 5
"""Number of pairs that are timed, after a few that are not."""


class Processes:
    """The processes that a contestant has started, and this one."""

    def __init__(self, before: set[psutil.Process]) -> None:
        self._started = set(psutil.Process().children(recursive=True)) - before
        self._workers = [process for process in self._started if process.name() == "VLLM::Worker"]
        if not self._workers:
            raise SystemExit("no process VLLM::Worker was started: this vLLM has another name for them")

    def stop(self) -> None:
        for worker in self._workers:
            worker.suspend()

    def go_on(self) -> None:
        for worker in self._workers:
            worker.resume()

    def cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in (psutil.Process(), *self._started) if process.is_running()]
        return sum(time.user + time.system for time in times)


class InProcess:
    """vLLM called through its own interface, in this process."""

    def __init__(self, model: Path) -> None:
        before = set(psutil.Process().children(recursive=True))
        from vllm import LLM

        self._engine = LLM(
            str(model),
            dtype="float32",
            max_model_len=CONTEXT,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            skip_tokenizer_init=True,
            enforce_eager=True,
            disable_log_stats=True,
            enable_chunked_prefill=False,
        )
        self.processes = Processes(before)

    def tokens(self, prompts: list[list[int]], sampling: SamplingParams) -> int:
        from vllm import SamplingParams as Theirs

        theirs = [
            Theirs(
                n=sampling.n,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,
                seed=sampling.reseeded(i).seed,
                logprobs=0,
                detokenize=False,
            )
            for i in range(len(prompts))
        ]
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self._engine.generate(asked, theirs, use_tqdm=False)
        return sum(len(output.token_ids) for answer in answers for output in answer.outputs)


class Server:
    """vLLM as a server behind this project's HttpEngine."""

    def __init__(self, model: Path, loop: asyncio.AbstractEventLoop) -> None:
        before = set(psutil.Process().children(recursive=True))
        self._loop = loop
        self._engine = HttpEngine(EngineLaunch(KIND, model, "cpu", "float32", CONTEXT))
        loop.run_until_complete(self._engine.start())
        loop.run_until_complete(self._engine.resume())
        self.processes = Processes(before)

    def tokens(self, prompts: list[list[int]], sampling: SamplingParams) -> int:
        groups = self._loop.run_until_complete(self._engine.generate(prompts, sampling))
        return sum(len(response.token_ids) for group in groups for response in group)

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost per token."""

    seconds: float
    cpu_seconds: float


def cost(engine: InProcess | Server, prompts: list[list[int]], sampling: SamplingParams) -> Cost:
    engine.processes.go_on()
    try:
        used, start = engine.processes.cpu_seconds(), time.perf_counter()
        tokens = engine.tokens(prompts, sampling)
        seconds = time.perf_counter() - start
        return Cost(seconds / tokens, (engine.processes.cpu_seconds() - used) / tokens)
    finally:
        engine.processes.stop()


def measure(model: Path, prompts: list[list[int]], end: int) -> list[tuple[Cost, Cost]]:
    """Returns (cost in this process, cost as a server) for each pair."""
    inside, server = InProcess(model), Server(model, asyncio.new_event_loop())
    costs, endless = [], itertools.cycle(prompts)
    inside.processes.stop()
    server.processes.stop()
    try:
        for pair in range(PAIRS + WARM_UP):
            batch = [next(endless) for _ in range(PROMPTS)]
            sampling = SamplingParams(RESPONSES, TOKENS, 1.0, (end,), seed=pair)
            found = {e: cost(e, batch, sampling) for e in ((inside, server) if pair % 2 else (server, inside))}
            costs.append((found[inside], found[server]))
    finally:
        inside.processes.go_on()
        server.processes.go_on()
        server.close()
    return costs[WARM_UP:]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder) / "task")
        rows = [row["prompt"] for _, row in read_rows(Path(folder) / "task/train.jsonl")]
    prompts = [tokenizer(row)["input_ids"] for row in rows]
    costs = measure(options.model.resolve(), prompts, tokenizer.eos_token_id)
    low, middle, high = statistics.quantiles([server.seconds / inside.seconds for inside, server in costs], n=4)
    cpu = statistics.quantiles([server.cpu_seconds / inside.cpu_seconds for inside, server in costs], n=4)
    tokens_per_second = {
        "in this process": 1 / statistics.median(inside.seconds for inside, _ in costs),
        "as a server": 1 / statistics.median(server.seconds for _, server in costs),
    }
    for name, value in tokens_per_second.items():
        Console().print(f"{name}: {value:,.0f} tokens/s")
    Console().print(f"seconds per token, server / in this process: {middle:.3f} (quartiles {low:.3f}, {high:.3f})")
    Console().print(f"CPU seconds per token: {cpu[1]:.3f} (quartiles {cpu[0]:.3f}, {cpu[2]:.3f})")
    keep(
        options.out,
        "http_engine",
        tokens_per_second=tokens_per_second,
        ratio={"median": middle, "quartiles": [low, high], "pairs": PAIRS},
        cpu_ratio={"median": cpu[1], "quartiles": [cpu[0], cpu[2]]},
    )


if __name__ == "__main__":
    main()
