"""SGLang's command line and HTTP interface, as of release 0.5.23."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_rl.rollout.engines.interface import Address, Drafts, EngineLaunch, response_of
from megatron_rl.rollout.engines.sglang import receiver as sglang_receiver
from megatron_rl.rollout.servers.server import (
    UNSYNCED,
    HttpClient,
    ServerRefused,
    ServerUnavailable,
    version_of,
    versions,
)
from megatron_rl.types import FinishReason, Response, SamplingParams
from megatron_rl.utils.files import owned_folder
from megatron_rl.utils.nccl import agreed_environment
from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import Checksums, NotComparable, compare
from megatron_rl.weight_sync.digest import algorithm_on
from megatron_rl.weight_sync.receivers import RECEIVERS
from megatron_rl.weight_sync.transport import CollectiveUpdate, FolderUpdate, GroupMember

CONTROL_SECONDS = 60.0
"""Time limit of a call without computation."""
RESERVED = 8
"""Extra context length. SGLang refuses prompts within 6 tokens of its context length, and a prompt with a partial
response may be that long. No token ever has one of these positions."""
OTHER_LAYOUTS = ("quantization", "enable_dp_attention")
"""Settings with which SGLang's ranks hold other tensors than `weight_sync/checksums.py` expects."""


def command(launch: EngineLaunch, port: int, key: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command line, and environment variables beside this process's own. The key goes into a file, since command
    lines are public in the list of processes."""
    settings = launch.server
    key_file = folder / "sglang.yaml"
    key_file.touch(mode=0o600)
    key_file.write_text(f"api-key: {key}\nadmin-api-key: {key}\n")
    arguments = {
        "--model-path": str(launch.model_folder),
        "--host": launch.host,
        "--port": str(port),
        "--config": str(key_file),
        "--dtype": launch.dtype,
        "--context-length": str(launch.max_tokens + RESERVED),
        "--tensor-parallel-size": str(settings.tensor_parallel),
        "--weight-version": str(UNSYNCED),
        "--custom-weight-loader": sglang_receiver.LOADER,
        "--log-level": "warning",
    }
    environment = {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if launch.device == "cuda":
        environment |= agreed_environment()
    else:
        arguments |= {"--device": "cpu", "--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        arguments |= {"--max-total-tokens": str(max(16384, 4 * launch.max_tokens))}  # else SGLang takes all free memory
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        all_cores = f"0-{(os.cpu_count() or 1) - 1}"  # else each rank needs a NUMA node of its own
        environment |= {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([all_cores] * settings.tensor_parallel)}
    line = [str(settings.python or sys.executable), "-m", "sglang.launch_server"]
    line += [word for pair in arguments.items() for word in pair]
    line += ["--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"]
    line += ["--enable-memory-saver"] if launch.colocated else []
    return [*line, *settings.arguments], environment | settings.environment


class SglangServer:
    """Implements `Server`."""

    def __init__(self, address: Address) -> None:
        self._http = HttpClient(address)
        self._groups: list[str] = []
        self._own_receiver = False
        """Whether the server is in groups of our own receiver in SGLang's processes: mapped memory, changed weights."""
        self._ranks = 0
        self._drafts = Drafts()
        self._folder: Path | None = None
        """Folder in which the receiver leaves its error messages."""

    async def alive(self) -> None:
        await self._http.get("/health_generate", timeout_seconds=CONTROL_SECONDS)

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float) -> list[Response]:
        body = {"input_ids": list(prompt), "sampling_params": _sampling(sampling), "return_logprob": True}
        answer = await self._http.post("/generate", body, timeout_seconds=timeout_seconds)
        answers = answer if isinstance(answer, list) else [answer]
        for meta in (answer["meta_info"] for answer in answers):
            proposed, accepted = (meta.get(f"spec_num_{kind}_drafts", 0) for kind in ("proposed", "correct"))
            self._drafts += Drafts(proposed, accepted)
        return [_response(answer, sampling.stop_token_ids) for answer in answers]

    async def abort_all(self) -> None:
        await self._http.post("/abort_request", {"abort_all": True}, timeout_seconds=CONTROL_SECONDS)

    async def weight_version(self) -> int:
        info = await self._http.get("/model_info", timeout_seconds=CONTROL_SECONDS)
        return version_of(info["weight_version"])

    async def drafts(self) -> Drafts:
        return self._drafts  # of the answers that came here: a router's connection has those of its own

    async def cannot_freeze(self) -> str:
        """SGLang's in-place pause was tried on a CPU with release 0.5.23: the log-probs of kept responses are not those
        that the reported weights give on the cache of the older ones."""
        return "SGLang's log-probs are not as expected for requests that it keeps"

    async def freeze(self, timeout_seconds: float) -> None:
        raise NotImplementedError("see cannot_freeze")

    async def unfreeze(self, timeout_seconds: float) -> None:
        raise NotImplementedError("see cannot_freeze")

    async def load_weights(self, update: FolderUpdate, timeout_seconds: float) -> None:
        body = {"model_path": str(update.folder), "weight_version": str(update.version), "flush_cache": True}
        await self._http.post("/update_weights_from_disk", body, timeout_seconds=timeout_seconds)

    async def join_groups(self, members: Sequence[GroupMember], timeout_seconds: float) -> None:
        own = [member for member in members if member.transport in RECEIVERS]
        if own or self._own_receiver:
            await self._join_own(own, timeout_seconds)
        members = [member for member in members if member not in own]
        for name in self._groups:
            await self._http.post(
                "/destroy_weights_update_group", {"group_name": name}, timeout_seconds=timeout_seconds
            )
        self._groups = [member.name for member in members]
        for member in members:
            body = {
                "master_address": member.host,
                "master_port": member.port,
                "rank_offset": member.rank,
                "world_size": member.size,
                "group_name": member.name,
                "backend": member.backend,
            }
            await self._http.post("/init_weights_update_group", body, timeout_seconds=timeout_seconds)

    async def _join_own(self, members: Sequence[GroupMember], timeout_seconds: float) -> None:
        info = await self._http.get("/server_info", timeout_seconds=CONTROL_SECONDS)
        self._ranks, self._own_receiver = int(info["tp_size"]), bool(members)
        self._folder = self._folder or owned_folder("megatron-rl-sglang-", Path(tempfile.gettempdir()))
        orders = sglang_receiver.join(members, self._ranks, self._failures)
        await self._begin(timeout_seconds)
        try:
            await self._order(orders, {"flush_cache": False}, timeout_seconds)
        finally:
            await self._http.post("/end_weight_update", {}, timeout_seconds=timeout_seconds)

    async def receive_weights(self, update: CollectiveUpdate, timeout_seconds: float) -> None:
        await self._begin(timeout_seconds)
        receive = self._receive_own if self._own_receiver else self._receive_broadcast
        try:
            calls = update.portions()
            for number, (group, bucket) in enumerate(calls, start=1):
                last = number == len(calls)
                ending = {"flush_cache": last, "weight_version": str(update.version) if last else None}
                await receive(group, bucket, ending, timeout_seconds)
        finally:  # also after a failure, since the next update begins a session of its own
            await self._http.post("/end_weight_update", {}, timeout_seconds=timeout_seconds)

    async def _receive_broadcast(
        self, group: str, bucket: Sequence[TensorSpec], ending: dict[str, Any], timeout_seconds: float
    ) -> None:
        body = {
            "names": [spec.name for spec in bucket],
            "dtypes": [spec.dtype for spec in bucket],
            "shapes": [list(spec.shape) for spec in bucket],
            "group_name": group,
            "load_format": "flattened_bucket",
            "selector": "target",
        }
        await self._http.post("/update_weights_from_distributed", body | ending, timeout_seconds=timeout_seconds)

    async def _receive_own(
        self, group: str, bucket: Sequence[TensorSpec], ending: dict[str, Any], timeout_seconds: float
    ) -> None:
        orders = sglang_receiver.take(group, bucket, self._ranks, self._failures)
        await self._order(orders, ending, timeout_seconds)

    @property
    def _failures(self) -> Path:
        assert self._folder
        return self._folder / "failures"

    async def _order(self, orders: list[str], ending: dict[str, Any], timeout_seconds: float) -> None:
        """Sends an order to our receiver in SGLang's processes (`receiver.py`). Raises the receiver's error, if any."""
        self._failures.unlink(missing_ok=True)
        body = {"serialized_named_tensors": orders, "load_format": sglang_receiver.LOADER, "selector": "target"}
        await self._http.post("/update_weights_from_tensor", body | ending, timeout_seconds=timeout_seconds)
        if self._failures.exists():
            raise ServerRefused(self._failures.read_text().partition("\n")[0])

    async def _begin(self, timeout_seconds: float) -> None:
        body = {"selector": "target"}
        try:
            await self._http.post("/begin_weight_update", body, timeout_seconds=timeout_seconds)
        except ServerRefused:  # an earlier update is still open, since its end did not reach the server
            await self._http.post("/end_weight_update", {}, timeout_seconds=timeout_seconds)
            await self._http.post("/begin_weight_update", body, timeout_seconds=timeout_seconds)

    async def release_memory(self, timeout_seconds: float) -> None:
        """Waits until the scheduler is done with all requests, even answered ones: SGLang ends if it is not."""
        wait = f"/flush_cache?timeout={timeout_seconds:g}"
        await self._http.post(wait, timeout_seconds=timeout_seconds + CONTROL_SECONDS)
        body = {"tags": ["kv_cache", "weights"]}
        await self._http.post("/release_memory_occupation", body, timeout_seconds=timeout_seconds)

    async def restore_memory(self, part: Literal["weights", "kv_cache"], timeout_seconds: float) -> None:
        await self._http.post("/resume_memory_occupation", {"tags": [part]}, timeout_seconds=timeout_seconds)

    async def verify_weights(self, version: int, sent: Checksums, timeout_seconds: float) -> int:
        info = await self._http.get("/server_info", timeout_seconds=CONTROL_SECONDS)
        if others := [f"{name}={info[name]}" for name in OTHER_LAYOUTS if info.get(name)]:
            raise NotComparable(f"weights of version {version} cannot be compared: SGLang has {', '.join(others)}")
        answer = await self._http.post("/weights_checker", {"action": "checksum"}, timeout_seconds=timeout_seconds)
        algorithm = algorithm_on(info["device"])  # the answer does not say which one SGLang used
        held = {
            f"{rank['parallelism_info'][0]['tp_rank']}:{name}": f"{algorithm}:{value}"
            for rank in answer["ranks"]
            for name, value in rank["checksums"].items()
        }
        return compare(sent.fused, held, version)

    async def close(self) -> None:
        await self._http.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """The seed is left out: it works only under deterministic inference, and there makes all n responses the same."""
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,  # it would ignore our stop tokens too
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }


def _response(answer: dict[str, Any], stop_token_ids: Sequence[int]) -> Response:
    meta = answer["meta_info"]
    tokens = np.array(answer.get("output_ids") or [], dtype=np.int32)
    entries = meta.get("output_token_logprobs") or []  # [log-prob, id, null] of each token; a log-prob of NaN is null
    log_probs = np.array([entry[0] for entry in entries], dtype=np.float32)
    finish = meta["finish_reason"]
    if finish.get("status_code"):
        raise ServerUnavailable(f"/generate: {finish}")
    reason: FinishReason = finish["type"]
    if reason == "stop" and tokens[-1] not in stop_token_ids:
        reason = (
            "abort"  # SGLang also stops at the model's own end tokens; if they are not ours, the response is continued
        )
    version, changes = versions(meta.get("weight_versions") or [], len(tokens))
    return response_of(tokens, log_probs[: len(tokens)], reason, version, changes)
