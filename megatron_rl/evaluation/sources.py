"""Sources of responses to evaluate: a model in this process, or one behind a server."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_rl.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import max_positions_of
from megatron_rl.models.hf_format import read_config
from megatron_rl.reward.decode import decoder_of
from megatron_rl.types import Decode, FinishReason, Prompt, Response, Sample, SamplingParams
from megatron_rl.utils.bounded import read_bytes
from megatron_rl.utils.web import RequestFailed, ask

if TYPE_CHECKING:
    from megatron_rl.rollout.engines.transformers.engine import TransformersEngine

EDGE = 2**20
"""Number of bytes at either end of a weight file that, with the size, identify the file."""


class Source(Protocol):
    """Samples responses."""

    identity: dict[str, Any]
    """Identifies the model: an evaluation continues only with the same one."""
    tokenizer: Any
    """None if only the source itself has a tokenizer."""
    stop: tuple[int, ...]
    """Tokens that end a response; empty if the source knows them itself."""
    decode: Decode | None
    """Turns responses into text; None if samples already have their text."""
    vocabulary: int | None
    """Number of the model's token ids; None if only the source knows it."""
    positions: int | None
    """Longest sequence that the model takes; None if only the source knows it."""

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        """Returns `sampling.n` samples per prompt, in the prompts' order. Raises UserError if the source is gone."""
        ...


class ModelFolder:
    """A Hugging Face folder, loaded into this process, for small models without a server."""

    def __init__(
        self, folder: Path, *, name: str, device: str = "auto", dtype: str = "auto", max_positions: int | None = None
    ) -> None:
        """`name`: the name that the user knows the model by. `max_positions`: longest sequence, unless
        config.json says it."""
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.stop = stop_token_ids(self.tokenizer, folder, None)
        self.decode: Decode | None = decoder_of(self.tokenizer)
        self.identity = {"model": name, "weights": _fingerprint(folder)}
        config = read_config(folder)
        self.vocabulary: int | None = config.get("vocab_size")
        stated = max_positions_of(config) if "max_position_embeddings" in config else None
        self.positions: int | None = max_positions or stated
        self._device, self._dtype = device, dtype
        self._engine: TransformersEngine | None = None

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        groups = self.engine().generate([prompt.token_ids for prompt in prompts], sampling)
        pairs = zip(prompts, groups, strict=True)
        return [Sample(prompt, response, text="") for prompt, group in pairs for response in group]

    def engine(self) -> TransformersEngine:
        """Loads the engine when it is first needed; a finished evaluation does not need it."""
        if self._engine is None:
            import torch

            from megatron_rl.rollout.engines.transformers.engine import TransformersEngine

            device = self._device if self._device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            silence_loading()
            dtype = self._dtype if self._dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
            self._engine = TransformersEngine(self.folder, device, dtype)
        return self._engine


class CompletionServer:
    """A server with OpenAI's /v1/completions, such as vLLM and SGLang."""

    def __init__(
        self, url: str, *, model: str | None, tokenizer: Path | None, concurrency: int, timeout: float
    ) -> None:
        """Raises UserError if the server does not answer, or serves several models and none is named."""
        self._url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        self._timeout = timeout
        self.vocabulary: int | None = None
        self.positions: int | None = None
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self.stop: tuple[int, ...] = ()
        self.decode: Decode | None = None  # the server answers with text
        self._model = model or self._only_model()
        self.identity = {"server": self._url, "model": self._model}
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="completions")

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        requests = [
            (prompt, sampling.reseeded(place * sampling.n + number))
            for place, prompt in enumerate(prompts)
            for number in range(sampling.n)
        ]
        return list(self._threads.map(lambda request: self._one(*request), requests))

    def _one(self, prompt: Prompt, sampling: SamplingParams) -> Sample:
        # Ids are exact. From a text, the server's tokenizer may make other ids, such as a begin token in front.
        answer = self._ask(
            "/completions", self._body(list(prompt.token_ids) if self.tokenizer else prompt.text, sampling)
        )
        try:
            # An empty answer is an answer, but a response without a token counts as failed. Some servers do not count
            # the token that ends a response.
            choice, tokens = answer["choices"][0], max(1, int(answer["usage"]["completion_tokens"]))
            reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
            # The server reports the number of tokens, not their ids.
            return Sample(
                prompt, Response(np.full(tokens, -1, np.int32), np.zeros(0, np.float32), reason, 0), str(choice["text"])
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self._url}/completions gives an answer of unknown form: {str(answer)[:200]}") from error

    def respond(self, prompt: Sequence[int], sampling: SamplingParams) -> Future[Response]:
        """Asks for one response to these tokens, as tokens without log-probs. The call ends with UserError if the
        server is gone or does not give tokens."""
        return self._threads.submit(self._tokens_of, prompt, sampling)

    def _tokens_of(self, prompt: Sequence[int], sampling: SamplingParams) -> Response:
        body = self._body(list(prompt), sampling) | {"return_token_ids": True}
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
        answer = self._ask("/completions", body)
        try:
            choice = answer["choices"][0]
            reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
            return Response(np.array(choice["token_ids"], np.int32), np.zeros(0, np.float32), reason, 0)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._url}/completions gives no token ids (return_token_ids), which an agent's history is made of; "
                f"SGLang and vLLM do. Its answer: {str(answer)[:200]}"
            ) from error

    def _body(self, prompt: Any, sampling: SamplingParams) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "seed": sampling.seed % 2**31,
        }

    def _only_model(self) -> str:
        answer = self._ask("/models", None)
        names = [str(entry.get("id")) for entry in answer.get("data", [])] if isinstance(answer, dict) else []
        if len(names) != 1:
            raise UserError(f"{self._url} serves {', '.join(names) or 'no model'}: choose one with --model-name")
        return names[0]

    def _ask(self, path: str, body: Any) -> Any:
        try:
            return ask(self._url + path, body, timeout=self._timeout, retries=4)
        except RequestFailed as error:
            raise UserError(
                f"{self._url}{path}: {error}. Finished batches are kept: the same command continues"
            ) from error


def silence_loading() -> None:
    """Turns off the progress bar of transformers, which would interfere with the command's own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _fingerprint(folder: Path) -> str:
    """Returns a hash of the configuration and of both ends of every weight file. Raises UserError if there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder}: there are no weights (*.safetensors) in this folder")
    digest = hashlib.sha256(read_bytes(folder / "config.json") if (folder / "config.json").is_file() else b"")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:32]
