"""What is evaluated: a model in this process, or one behind a server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_rl.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.types import FinishReason, Generation, Prompt, Sample, SamplingParams
from megatron_rl.utils.web import RequestFailed, ask

if TYPE_CHECKING:
    from megatron_rl.rollout.engines.transformers.engine import TransformersEngine

EDGE = 2**20
"""Bytes at either end of a weight file that identify it, with its size."""


class Source(Protocol):
    """Samples responses."""

    identity: dict[str, Any]
    """Tells this model from others: an evaluation goes on with the same one only."""
    tokenizer: Any
    """None where the source has one of its own."""
    stop: tuple[int, ...]
    """Tokens that end a response; empty where the source knows them."""

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        """`sampling.n` samples a prompt, group after group. Raises UserError when the source is gone."""
        ...


class ModelFolder:
    """A Hugging Face folder, loaded into this process: for small models, and for those without a server."""

    def __init__(self, folder: Path, *, name: str, device: str = "auto", dtype: str = "auto") -> None:
        """`name`: what the user calls it."""
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.stop = stop_token_ids(self.tokenizer, folder, None)
        self.identity = {"model": name, "weights": _fingerprint(folder)}
        self._device, self._dtype = device, dtype
        self._engine: TransformersEngine | None = None

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        from megatron_rl.rollout.sample import collect

        return collect(self, prompts, sampling, self.tokenizer)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Generation]]:
        return self._loaded().generate([prompt.token_ids for prompt in prompts], sampling)

    def _loaded(self) -> TransformersEngine:
        """Loaded when it is first needed: a finished evaluation needs it no more."""
        if self._engine is None:
            import torch

            from megatron_rl.rollout.engines.transformers.engine import TransformersEngine

            device = self._device if self._device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            silence_loading()
            dtype = self._dtype if self._dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
            self._engine = TransformersEngine(self.folder, device, dtype)
        return self._engine


class CompletionServer:
    """A server with OpenAI's /v1/completions, as vLLM, SGLang and others have it."""

    def __init__(
        self, url: str, *, model: str | None, tokenizer: Path | None, concurrency: int, timeout: float
    ) -> None:
        """Raises UserError where nobody answers, or serves several models and none is named."""
        self._url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        self._timeout = timeout
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self.stop: tuple[int, ...] = ()
        self._model = model or self._only_model()
        self.identity = {"server": self._url, "model": self._model}
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="completions")

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        requests = [
            (prompt, group, sampling.reseeded(group * sampling.n + number))
            for group, prompt in enumerate(prompts)
            for number in range(sampling.n)
        ]
        return list(self._threads.map(lambda request: self._one(*request), requests))

    def _one(self, prompt: Prompt, group: int, sampling: SamplingParams) -> Sample:
        body = {
            "model": self._model,
            # Of a text, the server's tokenizer may make something else: it may put its own beginning in front.
            "prompt": list(prompt.token_ids) if self.tokenizer else prompt.text,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "seed": sampling.seed % 2**31,
        }
        answer = self._ask("/completions", body)
        try:
            choice, tokens = answer["choices"][0], int(answer["usage"]["completion_tokens"])
            reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
            # The server says how many tokens there were, not which.
            generation = Generation([-1] * tokens, [], reason, 0)
            return Sample(prompt=prompt, group=group, generation=generation, text=str(choice["text"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self._url}/completions answers in no form known here: {str(answer)[:200]}") from error

    def _only_model(self) -> str:
        answer = self._ask("/models", None)
        names = [str(entry.get("id")) for entry in answer.get("data", [])] if isinstance(answer, dict) else []
        if len(names) != 1:
            raise UserError(f"{self._url} serves {', '.join(names) or 'no model'}: say which with --model-name")
        return names[0]

    def _ask(self, path: str, body: Any) -> Any:
        try:
            return ask(self._url + path, body, timeout=self._timeout, retries=4)
        except RequestFailed as error:
            raise UserError(f"{self._url}{path}: {error}. What is done is kept: the same command goes on") from error


def silence_loading() -> None:
    """transformers' own progress bar would run into ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _fingerprint(folder: Path) -> str:
    """A hash of the configuration and of the ends of every weight file. UserError where there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: there are no weights (*.safetensors) in this folder")
    digest = hashlib.sha256((folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b"")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:32]
