"""vLLM's command line and HTTP interface, as of release 0.32."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from megatron_rl.rollout.engines.interface import Address, Drafts, EngineLaunch, response_of
from megatron_rl.rollout.engines.vllm.array_frames import Choice
from megatron_rl.rollout.engines.vllm.plugin import BACKEND, EXTENSION
from megatron_rl.rollout.engines.vllm.request_batcher import RequestBatcher
from megatron_rl.rollout.servers.server import HttpClient, ServerRefused, ServerUnavailable, version_of, versions
from megatron_rl.types import FinishReason, Response, SamplingParams
from megatron_rl.utils.nccl import agreed_environment
from megatron_rl.weight_sync.checksums import Checksums, compare
from megatron_rl.weight_sync.transport import CollectiveUpdate, FolderUpdate, GroupMember

MIDDLEWARE = (
    "megatron_rl.rollout.engines.vllm.batch_endpoint.BatchEndpoint",
    "megatron_rl.rollout.engines.vllm.key_check.KeyCheck",  # last: it runs before all others
)
DRAFT_COUNTERS = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
"""Names in /metrics: tokens that were proposed, and those accepted."""
CONTROL_SECONDS = 60.0
"""Time limit of a call without computation."""


def command(launch: EngineLaunch, port: int, key: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command line, and environment variables beside this process's own; the key is among the latter."""
    settings = launch.server
    arguments = {
        "--model": str(launch.model_folder),
        "--host": launch.host,
        "--port": str(port),
        "--dtype": launch.dtype,
        "--max-model-len": str(launch.max_tokens),
        "--tensor-parallel-size": str(settings.tensor_parallel),
        "--logprobs-mode": "processed_logprobs",  # at the sampling temperature
        "--weight-transfer-config": json.dumps({"backend": BACKEND}),
        "--worker-extension-cls": EXTENSION,
        "--generation-config": "vllm",  # else the model's folder may set a top-p
    }
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": key}
    environment |= {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # model.max_positions may go beyond the model's own
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}  # dev mode: weight updates over HTTP
    line = [str(settings.python or sys.executable), "-m", "vllm.entrypoints.openai.api_server"]
    line += [word for pair in arguments.items() for word in pair]
    line += [word for name in MIDDLEWARE for word in ("--middleware", name)]
    line += ["--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"]
    line += ["--enable-sleep-mode"] if launch.colocated else []
    if launch.device == "cuda":
        environment |= agreed_environment()
    else:
        line += ["--enforce-eager"]
        if not settings.speculates:
            line += ["--disable-log-stats"]  # statistics for /metrics take longer than the answers
        line += ["--no-enable-chunked-prefill"]  # on CPU, chunked prompts with seeds end vLLM
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else each rank needs a NUMA node of its own
    return [*line, *settings.arguments], environment | settings.environment


class VllmServer:
    """Implements `Server`."""

    def __init__(self, address: Address) -> None:
        self._http = HttpClient(address)
        self._batcher = RequestBatcher(self._http)
        self._took_checksums = False
        self._asleep = self._frozen = False
        self._salt: dict[str, str] = {}
        """Keeps the prefixes that requests share apart from those that weights before the last update computed."""

    async def alive(self) -> None:
        await self.weight_version()  # /health does not notice a hung engine core

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float) -> list[Response]:
        request = {"token_ids": list(prompt), "sampling_params": _sampling(sampling)} | self._salt
        choices = await self._batcher.send(request, timeout_seconds)
        if choices is None:
            answer = await self._http.post("/inference/v1/generate", request, timeout_seconds=timeout_seconds)
            choices = [_choice(choice) for choice in answer["choices"]]
        return [_response(choice) for choice in sorted(choices, key=lambda choice: choice.index)]

    async def abort_all(self) -> None:
        await self._http.post("/abort_requests", {}, timeout_seconds=CONTROL_SECONDS)

    async def weight_version(self) -> int:
        info = await self._http.get("/weight_info", timeout_seconds=CONTROL_SECONDS)
        return version_of(info["weight_version"])

    async def drafts(self) -> Drafts:
        """From the counters of /metrics, which vLLM has if it speculates, and not with `--disable-log-stats`."""
        text = await self._http.get("/metrics", timeout_seconds=CONTROL_SECONDS)
        proposed, accepted = (
            sum(int(float(value)) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
            for name in DRAFT_COUNTERS
        )
        return Drafts(proposed, accepted)

    async def cannot_freeze(self) -> str:
        return ""

    async def freeze(self, timeout_seconds: float) -> None:
        # clear_cache is said to be ignored here, but would make vLLM compute the cache of all requests again.
        await self._http.post("/pause?mode=keep&clear_cache=false", timeout_seconds=timeout_seconds)
        self._frozen = True

    async def unfreeze(self, timeout_seconds: float) -> None:
        await self._http.post("/resume", timeout_seconds=timeout_seconds)
        self._frozen = False

    async def load_weights(self, update: FolderUpdate, timeout_seconds: float) -> None:
        portions = [{"files": [str(part)], "take_checksums": update.take_checksums} for part in update.parts]
        await self._update(portions, update.version, timeout_seconds)
        self._took_checksums = update.take_checksums

    async def join_groups(self, members: Sequence[GroupMember], timeout_seconds: float) -> None:
        body = {"init_info": {"members": [asdict(member) for member in members]}}
        await self._http.post("/init_weight_transfer_engine", body, timeout_seconds=timeout_seconds)
        await self._raise_failure()

    async def receive_weights(self, update: CollectiveUpdate, timeout_seconds: float) -> None:
        order = update.portions()
        portions = [
            {
                "group": group,
                "bucket": [[spec.name, spec.dtype, list(spec.shape)] for spec in bucket],
                "then": [(name, sum(spec.nbytes for spec in following)) for name, following in order[i + 1 : i + 2]],
                "take_checksums": update.take_checksums,
            }
            for i, (group, bucket) in enumerate(order)
        ]
        await self._update(portions, update.version, timeout_seconds)
        self._took_checksums = update.take_checksums

    async def _update(self, portions: list[dict[str, Any]], version: int, timeout_seconds: float) -> None:
        """Updates weights through our receiver in vLLM's processes (`receiver.py`).

        A request that was given up may still be on its way to the server, and would end vLLM if it ran with a part of
        the weights. vLLM is therefore paused until it has all of them.
        """
        paused = self._asleep or self._frozen
        if not paused:
            await self._http.post("/pause?mode=abort", timeout_seconds=timeout_seconds)
        await self._ask_workers("end_open_update", timeout_seconds)
        await self._http.post("/start_weight_update", timeout_seconds=timeout_seconds)
        for portion in portions:
            await self._http.post("/update_weights", {"update_info": portion}, timeout_seconds=timeout_seconds)
        await self._http.post("/finish_weight_update", timeout_seconds=timeout_seconds)  # also after a partial update
        await self._raise_failure()
        if self._frozen:
            self._salt = {"cache_salt": str(version)}  # vLLM resets no cache that requests use
        else:
            await self._http.post("/reset_prefix_cache", timeout_seconds=timeout_seconds)
        await self._http.post("/update_weight_version", {"new_version": str(version)}, timeout_seconds=CONTROL_SECONDS)
        if not paused:
            await self._http.post("/resume", timeout_seconds=timeout_seconds)

    async def _raise_failure(self) -> None:
        for failures in await self._ask_workers("weight_failure", CONTROL_SECONDS):
            if failures:
                raise ServerRefused(failures[0])

    async def _ask_workers(self, method: str, timeout_seconds: float) -> list[Any]:
        """Calls a method of each worker; returns their answers."""
        answer = await self._http.post("/collective_rpc", {"method": method}, timeout_seconds=timeout_seconds)
        results: list[Any] = answer["results"]
        return results

    async def release_memory(self, timeout_seconds: float) -> None:
        self._asleep = True  # a sleeping server stays paused until all of its memory is restored
        await self._http.post(
            "/sleep?level=2", timeout_seconds=timeout_seconds
        )  # level 1 would keep the weights in CPU memory

    async def restore_memory(self, part: Literal["weights", "kv_cache"], timeout_seconds: float) -> None:
        await self._http.post(f"/wake_up?tags={part}", timeout_seconds=timeout_seconds)
        self._asleep = part != "kv_cache"

    async def verify_weights(self, version: int, sent: Checksums, timeout_seconds: float) -> int:
        """Compares the weights as received, if their checksums were taken, and as held. On CPU the latter covers
        embeddings, norms and head only, since vLLM repacks linear layers there into a form that cannot be read back."""
        if self._took_checksums:
            for received in await self._ask_workers("received_checksums", timeout_seconds):
                compare(sent.plain, received, version)
        of_workers = await self._ask_workers("held_checksums", timeout_seconds)
        return compare(sent.fused, {name: value for held in of_workers for name, value in held.items()}, version)

    async def close(self) -> None:
        await self._http.close()


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """`min_tokens` is left out: it changes the returned log-probs."""
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # only our own stop tokens end a response
        "seed": sampling.seed,
        "logprobs": 0,  # log-probs of the sampled token only
        "detokenize": False,
    }


def _choice(answer: dict[str, Any]) -> Choice:
    """One choice of vLLM's own handler."""
    token_ids = answer["token_ids"] or []
    entries = (answer["logprobs"] or {}).get("content") or []
    return Choice(
        answer["index"],
        np.array(token_ids, dtype=np.int32),
        np.array([entry["logprob"] for entry in entries], dtype=np.float32),
        answer["finish_reason"],
        answer["weight_versions"] or [],
    )


def _response(choice: Choice) -> Response:
    reason = cast(FinishReason, choice.finish_reason)
    if reason not in ("stop", "length", "abort"):
        raise ServerUnavailable(f"a response of vLLM ended with {reason!r}")
    version, changes = versions(choice.weight_versions, len(choice.token_ids))
    return response_of(choice.token_ids, choice.log_probs, reason, version, changes)
