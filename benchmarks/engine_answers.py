"""Processor seconds that an engine's process spends on its server's answers, from the socket to the driver's arrays.

    python benchmarks/engine_answers.py [--before COMMIT] [--out benchmarks/results/engine_answers.json]
    .venv-engines/bin/python benchmarks/engine_answers.py --real [--servers vllm] [--out FILE]

A local stand-in answers in the real wire format of each server, as fast as it can be read: 256 responses (the share of
one of eight engines in a step of 2,048) of mean 4,000 tokens in groups of eight, with made-up tokens. A fresh process
with one thread asks for them through `HttpEngine`, one call per prompt as the driver makes them, and pickles the
responses as Ray does. The present code and that of an earlier commit take turns, pair after pair; both must receive
the same tokens, log-probs and versions bit for bit. Processor seconds leave out starting and importing.

With --real, each side starts a real server of a small random model in turn, and samples 8 x 8 responses of at most 256
tokens, twice; the second time counts. Processor seconds per token are then mostly those of the waiting event loop, and
show that nothing else got dearer.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
WORKING = sys.argv[1:2] == ["--work"]
sys.path.insert(0, sys.argv[2] if WORKING else str(HERE))

BEFORE = "14c18ea"
"""The last commit whose answers were lists in JSON."""
RESPONSES, MEAN, GROUP, PAIRS, SECONDS = 256, 4000, 8, 5, 4.0
"""Responses of an engine, their mean length, size of a group, pairs, and the target for the processor seconds."""
REAL_PROMPTS, REAL_TOKENS, CONTEXT = 8, 256, 512
KINDS = ("sglang", "vllm")


@dataclass(frozen=True)
class Answers:
    """Made-up responses: flat arrays, with the length of each response."""

    lengths: np.ndarray
    token_ids: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def draw(cls, responses: int, mean: int) -> Answers:
        from benchmarks.driver import VOCABULARY, draw_lengths

        random, lengths = np.random.default_rng(1), draw_lengths(responses, mean)
        ids = random.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32)
        ids[np.cumsum(lengths) - 1] = 2
        return cls(lengths, ids, -random.exponential(0.3, lengths.sum()).astype(np.float32))

    def group(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        ends = np.cumsum(self.lengths)
        rows = range(number * GROUP, (number + 1) * GROUP)
        spans = [slice(ends[row] - self.lengths[row], ends[row]) for row in rows]
        return [(self.token_ids[span], self.log_probs[span]) for span in spans]


def sglang_answer(group: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """The answer to /generate with `return_logprob`, as SGLang 0.5.23 gives it without a tokenizer."""
    answers = []
    for ids, log_probs in group:
        entries = [[p, token, None] for p, token in zip(log_probs.tolist(), ids.tolist(), strict=True)]
        meta = {
            "id": "9a5e21f4f1d14f67a2c2c6b0f9a0b5de",
            "finish_reason": {"type": "stop", "matched": 2},
            "prompt_tokens": 200,
            "weight_version": "-1",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": entries,
            "output_token_logprobs_length": len(entries),
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": 199,
            "weight_versions": [{"version": "-1", "start": 0, "end": len(ids)}],
            "e2e_latency": 1.25,
        }
        answers.append({"output_ids": ids.tolist(), "meta_info": meta})
    return json.dumps(answers, separators=(",", ":")).encode()


def span_of(ids: np.ndarray) -> list[dict[str, Any]]:
    return [{"version": "-1", "start": 0, "end": len(ids)}]


def vllm_frame(request: int, group: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A frame of our middleware in vLLM."""
    from megatron_rl.rollout.engines.vllm.array_frames import Choice, encode

    choices = [Choice(i, ids, log_probs, "stop", span_of(ids)) for i, (ids, log_probs) in enumerate(group)]
    return encode(request, choices)


def vllm_line(request: int, group: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A line of our middleware before it sent arrays."""
    choices = [
        {
            "index": i,
            "token_ids": ids.tolist(),
            "logprobs": {"content": [{"logprob": p} for p in log_probs.tolist()]},
            "finish_reason": "stop",
            "weight_versions": span_of(ids),
        }
        for i, (ids, log_probs) in enumerate(group)
    ]
    return json.dumps({"request": request, "choices": choices}).encode() + b"\n"


def serve() -> None:
    """A stand-in for both servers; prints its port."""
    from aiohttp import web

    answers = Answers.draw(RESPONSES, MEAN)
    groups = [answers.group(number) for number in range(RESPONSES // GROUP)]

    def cache(form: Callable[[int, Any], bytes]) -> Callable[[int, int], bytes]:
        return lru_cache(None)(lambda place, number: form(place, groups[number]))

    whole = cache(lambda _, group: sglang_answer(group))
    parts = {"/arrays/generate": cache(vllm_frame), "/brief/generate": cache(vllm_line)}

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": "-1"})

    async def generate(request: web.Request) -> web.Response:
        number = (await request.json())["input_ids"][0]
        return web.Response(body=whole(0, number), content_type="application/json")

    async def batch(request: web.Request) -> web.StreamResponse:
        asked = [one["token_ids"][0] for one in await request.json()]
        answer = web.StreamResponse()
        await answer.prepare(request)
        for place, number in enumerate(asked):
            await answer.write(parts[request.path](place, number))
        return answer

    app = web.Application(client_max_size=2**30)
    app.add_routes([web.get(path, version) for path in ("/health_generate", "/model_info", "/weight_info")])
    app.add_routes([web.post(path, batch) for path in ("/arrays/generate", "/brief/generate")])
    app.add_routes([web.post("/generate", generate)])

    async def main() -> None:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


# ---------------------------------------------------------------------- one side


def work(kind: str, url: str) -> dict[str, Any]:
    """Processor seconds of this process, and a checksum of what it received. url: of the stand-in, or a model folder
    with which a real server is started."""
    from megatron_rl.config.rollout import ServerSettings
    from megatron_rl.rollout.engines.interface import EngineLaunch
    from megatron_rl.rollout.engines.kind import engine_kind
    from megatron_rl.rollout.servers.http_engine import HttpEngine
    from megatron_rl.types import SamplingParams

    real = not url.startswith("http")
    settings = ServerSettings() if real else ServerSettings(urls=[url])
    at = {"model_folder": Path(url) if real else Path("none"), "url": None if real else url}
    launch = EngineLaunch(
        kind=engine_kind(kind), device="cpu", dtype="float32", max_tokens=CONTEXT, server=settings, **at
    )
    tokens, prompts = (REAL_TOKENS, REAL_PROMPTS) if real else (10**6, RESPONSES // GROUP)
    sampling = SamplingParams(GROUP, tokens, 1.0, (2,), 0)

    async def once(engine: HttpEngine) -> tuple[float, list[Any]]:
        start, received, store = time.process_time(), [], bytearray()
        for asking in asyncio.as_completed([engine.generate([(number, 5)], sampling) for number in range(prompts)]):
            groups = await asking
            buffers: list[pickle.PickleBuffer] = []
            store = bytearray(pickle.dumps(groups, 5, buffer_callback=buffers.append))
            for buffer in buffers:
                store += buffer.raw()
            received += groups
        return time.process_time() - start, received

    async def scenario() -> tuple[float, list[Any]]:
        engine = HttpEngine(launch)
        await engine.start()
        await engine.resume()
        try:
            if real:
                await once(engine)
            return await once(engine)
        finally:
            await engine.close()

    seconds, groups = asyncio.run(scenario())
    responses = sorted((r for group in groups for r in group), key=lambda r: (len(r), r.token_ids.tobytes()))
    checksum = 0
    for response in responses:
        for array in (response.token_ids, response.log_probs, response.weight_versions):
            checksum = zlib.crc32(np.ascontiguousarray(array).tobytes(), checksum)
    return {"seconds": seconds, "tokens": sum(map(len, responses)), "checksum": checksum}


def run_side(root: Path, kind: str, url: str) -> dict[str, Any]:
    # Ray's and torch's threads are none of this; a server that the side starts imports the side's own code.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *_path()])}
    command = [sys.executable, __file__, "--work", str(root), kind, url]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=root)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != HERE]


def random_model(folder: Path) -> str:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape, **heads))
    model.save_pretrained(folder)
    return str(folder)


def code_of(commit: str, folder: Path) -> Path:
    """Writes the packages of a commit to a folder."""
    names = ["megatron_rl", "lpreg", "pyproject.toml"]
    archive = subprocess.run(["git", "archive", commit, *names], cwd=HERE, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def pairs_of(kind: str, before: Path, url: str, count: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    roots = {"before": before, "after": HERE}
    for pair in range(count):
        for side in sorted(roots, reverse=pair % 2 == 0):
            found[side].append(run_side(roots[side], kind, url))
    return {"server": kind, "sides": found} | {
        f"{side}_microseconds_per_token": min(1e6 * run["seconds"] / run["tokens"] for run in runs)
        for side, runs in found.items()
    }


def main() -> None:
    from rich.console import Console

    from benchmarks.machine import arguments, keep, kept_before

    parser = arguments(__doc__)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--servers", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--real", action="store_true", help="real servers in place of the stand-in")
    options = parser.parse_args()
    known = kept_before(options.out, "cases") or []
    others = [case for case in known if case["server"] not in options.servers]  # servers may be measured one by one
    with tempfile.TemporaryDirectory() as name:
        before = code_of(options.before, Path(name))
        if options.real:
            model = random_model(Path(name) / "model")
            cases = [pairs_of(kind, before, model, options.pairs) for kind in options.servers]
        else:
            cases = against_stand_in(before, options.servers, options.pairs)
    for case in cases:
        rates = {side: case[f"{side}_microseconds_per_token"] for side in ("before", "after")}
        line = f"{case['server']}: {rates['before']:.2f} us per token before, {rates['after']:.2f} after"
        if "seconds" in case:
            line += f"; {case['seconds']:.2f} s for {RESPONSES} responses of mean {MEAN} ({SECONDS:g} s allowed)"
        Console().print(line, highlight=False)
    keep(options.out, "engine_answers", before=options.before, real=options.real, cases=[*others, *cases])


def against_stand_in(before: Path, kinds: list[str], pairs: int) -> list[dict[str, Any]]:
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        cases = [pairs_of(kind, before, url, pairs) for kind in kinds]
    finally:
        server.kill()
        server.wait()
    for case in cases:
        if len({run["checksum"] for runs in case["sides"].values() for run in runs}) != 1:
            raise SystemExit(f"{case['server']}: the two sides received different tokens")
        case["seconds"] = min(run["seconds"] for run in case["sides"]["after"])
        case["met"] = case["seconds"] <= SECONDS
    return cases


if __name__ == "__main__":
    if WORKING:
        print(json.dumps(work(*sys.argv[3:])))
    elif sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
