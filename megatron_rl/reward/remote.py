"""A reward model behind HTTP: posts batches, reads results, and declares an outcome whatever the server does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from megatron_rl.config.reward import RemoteSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward.decode import text_of
from megatron_rl.reward.results import result_of
from megatron_rl.types import Decode, RewardResult, Sample
from megatron_rl.utils.web import EXCERPT, RequestFailed, ask


class RemoteReward:
    """Posts batches of samples to `settings.remote.url`.

    A batch whose every attempt failed costs only its own samples: outcome "timeout" or "error". A time-out, a
    lost connection or a temporary status is followed by another attempt; a request that the server refuses, or whose
    answer cannot be read, fails at once.
    """

    def __init__(self, settings: RewardSettings, decode: Decode | None = None) -> None:
        """`decode` turns responses into text; None: every sample already has its text.

        Raises UserError if settings or the token are missing.
        """
        if settings.remote is None:
            raise UserError("reward.name: remote needs reward.remote.url")
        if not settings.remote.url.startswith(("http://", "https://")):
            raise UserError(f"reward.remote.url: {settings.remote.url!r} must begin with http:// or https://")
        self._settings: RemoteSettings = settings.remote
        self._decode = decode
        self._headers: dict[str, str] = {}
        if variable := settings.remote.token_variable:
            if not (token := os.environ.get(variable)):
                raise UserError(f"reward.remote.token_variable: the environment variable {variable} is not set")
            self._headers["Authorization"] = f"Bearer {token}"
        self._threads = ThreadPoolExecutor(settings.remote.concurrency, thread_name_prefix="remote-reward")

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result per sample, in order. A response that cannot be decoded is not posted: its outcome is "error"."""
        results: dict[int, RewardResult] = {}
        posted: dict[int, Sample] = {}
        for i, sample in enumerate(samples):
            try:
                posted[i] = replace(sample, text=text_of(sample, self._decode))
            except ValueError as error:
                results[i] = RewardResult(0.0, detail=str(error), outcome="error")
        size, texts = self._settings.batch_size, list(posted.values())
        batches = [texts[first : first + size] for first in range(0, len(texts), size)]
        scored = (result for part in self._threads.map(self._score_batch, batches) for result in part)
        for (i, sample), result in zip(posted.items(), scored, strict=True):
            results[i] = replace(result, text=sample.text)
        return [results[i] for i in range(len(samples))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _score_batch(self, samples: Sequence[Sample]) -> list[RewardResult]:
        settings = self._settings
        try:
            answer = ask(
                settings.url,
                {"samples": [_to_json(sample) for sample in samples]},
                headers=self._headers,
                timeout=settings.timeout_seconds,
                retries=settings.retries,
                backoff=settings.backoff_seconds,
            )
            return _read_results(answer, len(samples))
        except RequestFailed as error:
            failure = RewardResult(0.0, detail=str(error), outcome="timeout" if error.timed_out else "error")
        except ValueError as error:
            failure = RewardResult(0.0, detail=f"the server's answer cannot be used: {error}", outcome="error")
        return [failure] * len(samples)


def _to_json(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.prompt.id,
        "prompt": sample.prompt.text,
        "response": sample.text,
        "label": sample.prompt.label,
        "finish_reason": sample.response.finish_reason,
    }


def _read_results(answer: Any, count: int) -> list[RewardResult]:
    """`{"results": [{"score": 1.0, "answer": "34", "detail": "..."}, ...]}`; raises ValueError for anything else.

    A result without a finite score has the outcome "error".
    """
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise ValueError(f'expected {{"results": [...]}} with {count} entries, got {str(answer)[:EXCERPT]}')
    return [_read_result(index, result) for index, result in enumerate(results)]


def _read_result(index: int, result: Any) -> RewardResult:
    try:
        return result_of(result)
    except (TypeError, ValueError) as error:
        return RewardResult(0.0, detail=f"result {index} of the server has no finite score: {error}", outcome="error")
