"""A reward model behind HTTP: batches out, results in, and a declared outcome whatever the server does."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from megatron_rl.config.reward import RemoteSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.types import RewardResult, Sample

WORTH_RETRYING = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 30.0
"""Seconds between two attempts."""
EXCERPT = 200
"""Characters of a server's answer that a detail shows."""


class RemoteReward:
    """Posts batches of samples to `settings.remote.url`.

    A batch whose every attempt failed costs its own samples only: outcome "timeout" or "error", score 0. Further
    attempts follow a time-out, a lost connection, or a status that passes; a request that the server refuses or answers
    with nonsense fails at once.
    """

    def __init__(self, settings: RewardSettings) -> None:
        """Raises UserError where settings or the token are missing."""
        if settings.remote is None:
            raise UserError("reward.name: remote needs reward.remote.url")
        if not settings.remote.url.startswith(("http://", "https://")):
            raise UserError(f"reward.remote.url: {settings.remote.url!r} must begin with http:// or https://")
        self._settings: RemoteSettings = settings.remote
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if variable := settings.remote.token_variable:
            if not (token := os.environ.get(variable)):
                raise UserError(f"reward.remote.token_variable: the environment variable {variable} is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._threads = ThreadPoolExecutor(settings.remote.concurrency, thread_name_prefix="remote-reward")

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result a sample, in order."""
        size = self._settings.batch_size
        batches = [samples[first : first + size] for first in range(0, len(samples), size)]
        return [result for results in self._threads.map(self._score_batch, batches) for result in results]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _score_batch(self, samples: Sequence[Sample]) -> list[RewardResult]:
        body = json.dumps({"samples": [_to_json(sample) for sample in samples]}, default=str).encode()
        failure = RewardResult(0.0, outcome="error")
        for attempt in range(self._settings.retries + 1):
            if attempt:
                wait = self._settings.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                time.sleep(min(wait, LONGEST_WAIT))
            try:
                return _read_results(self._post(body), len(samples))
            except HTTPError as error:
                detail = error.read(EXCERPT).decode(errors="replace")
                failure = RewardResult(0.0, detail=f"status {error.code}: {detail}", outcome="error")
                if error.code not in WORTH_RETRYING:
                    break
            except TimeoutError:
                failure = RewardResult(0.0, detail="the server took too long", outcome="timeout")
            except (OSError, HTTPException) as error:
                failure = RewardResult(0.0, detail=_reason(error), outcome="error")
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    failure = RewardResult(0.0, detail="the server took too long", outcome="timeout")
            except ValueError as error:
                failure = RewardResult(0.0, detail=f"the server's answer cannot be used: {error}", outcome="error")
                break
        return [failure] * len(samples)

    def _post(self, body: bytes) -> bytes:
        request = Request(self._settings.url, data=body, headers=self._headers, method="POST")
        limit = self._settings.timeout_seconds
        deadline, parts = time.monotonic() + limit, []
        with urlopen(request, timeout=limit) as response:
            while part := response.read1(2**16):  # urlopen's own limit is for each read
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError
        return b"".join(parts)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _to_json(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.prompt.id,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "label": sample.prompt.label,
        "finish_reason": sample.generation.finish_reason,
    }


def _read_results(body: bytes, count: int) -> list[RewardResult]:
    """`{"results": [{"score": 1.0, "answer": "34", "detail": "..."}, ...]}`; ValueError for anything else."""
    answer = json.loads(body)
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise ValueError(f'expected {{"results": [...]}} with {count} entries, got {body[:EXCERPT]!r}')
    return [_read_result(index, result) for index, result in enumerate(results)]


def _read_result(index: int, result: Any) -> RewardResult:
    score = result.get("score") if isinstance(result, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"result {index} has no finite score: {str(result)[:EXCERPT]}")
    answer = result.get("answer")
    return RewardResult(float(score), None if answer is None else str(answer), str(result.get("detail", "")))
