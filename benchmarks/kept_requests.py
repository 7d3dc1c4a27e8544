"""Tokens that a real server prefills in a step with weight updates: requests aborted, and requests kept.

    .venv-engines/bin/python benchmarks/kept_requests.py [--servers vllm] [--out benchmarks/results/kept_requests.json]

The server holds a small random model on a CPU. A step has 8 prompts of 64 tokens with 8 responses of 384 tokens each,
and three weight updates at 1/4, 1/2 and 3/4 of the time that a step without updates took, as if responses outlasted
three steps of an asynchronous run. It runs twice: requests are aborted at each update and continue after another
prefill (`rollout.recompute_kv_cache: true`), or the server keeps them with their KV cache. The prefilled tokens are the
server's own count: vLLM's `prompt_tokens_by_source` (local_compute), SGLang's `realtime_tokens_total`
(prefill_compute). Prefix caching is on in both; what is cached is not computed and not counted. SGLang is measured on
request only: our client never lets it keep requests, so that both of its runs abort (`SglangServer.cannot_freeze`).
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from safetensors.torch import load_file

from benchmarks.engine_answers import KINDS, random_model
from benchmarks.machine import arguments, keep, kept_before
from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.rollout.engines.vllm.server import command
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import KEY_VARIABLE, HttpClient
from megatron_rl.types import Response, SamplingParams
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import FolderUpdate

PROMPTS, PROMPT, RESPONSES, TOKENS, UPDATES = 8, 64, 8, 384, 3
CONTEXT = 512
SAMPLING = SamplingParams(RESPONSES, TOKENS, 1.0, (999,), 0)
METRIC = {
    "sglang": re.compile(r'^sglang:realtime_tokens_total\{.*mode="prefill_compute".*\} (\S+)$', re.MULTILINE),
    "vllm": re.compile(r'^vllm:prompt_tokens_by_source_total\{.*source="local_compute".*\} (\S+)$', re.MULTILINE),
}
ARGUMENTS = {"sglang": ["--enable-metrics", "--max-total-tokens", "65536"], "vllm": []}


def with_statistics(*arguments: Any) -> tuple[list[str], dict[str, str]]:
    """vLLM's command line of a run on a CPU, which leaves out the statistics."""
    line, environment = command(*arguments)
    line.remove("--disable-log-stats")
    return line, environment


def prompts_of(step: int) -> list[list[int]]:
    """Other prompts in each step, so that no step finds those of another in the cache."""
    return [[(31 * i + 7 * k + 101 * step) % 900 + 1 for i in range(PROMPT)] for k in range(PROMPTS)]


async def step(engine: HttpEngine, number: int, updates: list[FolderUpdate], seconds: float) -> list[Response]:
    """Samples a step's responses. updates: those of the step, evenly over so many seconds."""
    asking = asyncio.create_task(engine.generate(prompts_of(number), SAMPLING))
    for update in updates:
        await asyncio.sleep(seconds / (len(updates) + 1))
        await engine.pause()
        await engine.update_weights(update)
        await engine.resume()
    return [response for group in await asking for response in group]


async def prefilled(http: HttpClient, kind: str) -> float:
    await asyncio.sleep(2)  # metrics arrive a moment after the answers
    text = await http.get("/metrics", timeout_seconds=60.0)
    return sum(map(float, METRIC[kind].findall(text)))


async def measure(kind: str, model: Path, weights: Path) -> dict[str, Any]:
    """Starts a server; attaches to it with requests aborted, and then with requests kept."""
    server_kind, settings = engine_kind(kind), ServerSettings(arguments=ARGUMENTS[kind])
    assert isinstance(server_kind, ServerKind)
    if kind == "vllm":
        server_kind = replace(server_kind, command="benchmarks.kept_requests:with_statistics")
    owner = HttpEngine(EngineLaunch(server_kind, model, "cpu", "float32", CONTEXT, settings))
    address = await owner.start()
    assert address and address.key
    os.environ[KEY_VARIABLE] = address.key
    http, found, version, number = HttpClient(address), {}, 0, 0

    def update() -> FolderUpdate:
        nonlocal version
        version += 1
        transport = FolderTransport(weights, 0, 2**20)
        transport.connect()
        return FolderUpdate(
            version, transport.push(iter(load_file(model / "model.safetensors").items()), version).parts
        )

    try:
        for mode, keeps in (("aborted", False), ("kept", True)):
            launch = replace(owner.launch, url=address.url, keeps_requests=keeps)
            engine = HttpEngine(launch)
            await engine.start()
            await engine.pause()
            await engine.update_weights(update())
            await engine.resume()
            start = time.monotonic()
            await step(engine, number, [], 0.0)
            seconds = time.monotonic() - start
            counted = await prefilled(http, kind)
            responses = await step(engine, number + 1, [update() for _ in range(UPDATES)], seconds)
            number += 2
            found[mode] = {
                "prefilled_tokens": await prefilled(http, kind) - counted,
                "sampled_tokens": sum(map(len, responses)),
                "responses_with_several_versions": sum(bool(response.version_changes) for response in responses),
            }
            await engine.close()
    finally:
        await http.close()
        await owner.close()
    return {"server": kind, "prompt_tokens": PROMPTS * PROMPT} | found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--servers", choices=KINDS, nargs="+", default=["vllm"])
    options = parser.parse_args()
    known = kept_before(options.out, "cases") or []
    cases = [case for case in known if case["server"] not in options.servers]  # servers may be measured one by one
    with tempfile.TemporaryDirectory() as folder:
        model = Path(random_model(Path(folder) / "model"))
        for kind in options.servers:
            cases.append(asyncio.run(measure(kind, model, Path(folder) / "weights")))
            aborted, kept = (cases[-1][mode]["prefilled_tokens"] for mode in ("aborted", "kept"))
            Console().print(
                f"{kind}: {aborted:,.0f} tokens prefilled with requests aborted, {kept:,.0f} with them kept"
            )
    keep(
        options.out,
        "kept_requests",
        settings={"prompts": PROMPTS, "responses": RESPONSES, "tokens": TOKENS, "updates": UPDATES},
        cases=cases,
    )


if __name__ == "__main__":
    main()
