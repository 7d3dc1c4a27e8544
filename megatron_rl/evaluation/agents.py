"""Evaluation with an agent, which asks a model folder in this process, or a server, in several turns."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import count, islice

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.evaluation import ProtocolSettings
from megatron_rl.errors import UserError
from megatron_rl.evaluation.sources import CompletionServer, ModelFolder
from megatron_rl.reward.decode import decoder_of
from megatron_rl.types import Decode, Prompt, Response, Sample, SamplingParams


class AgentSource:
    """Samples responses with the protocol's agent. See `Source`."""

    def __init__(self, model: ModelFolder | CompletionServer, protocol: ProtocolSettings) -> None:
        """Raises UserError if the agent cannot be imported, or a server's tokenizer is not known."""
        assert protocol.agent
        if model.tokenizer is None:
            raise UserError("agent: an agent's history is made of tokens: give the model's --tokenizer FOLDER")
        self.model, self.settings, self.agent = model, protocol.agent, load_agent(protocol.agent)
        self.identity, self.tokenizer = model.identity, model.tokenizer
        self.decode: Decode | None = decoder_of(model.tokenizer)
        self.stop, self.vocabulary, self.positions = model.stop, model.vocabulary, model.positions
        longest = [suite.max_response_tokens or protocol.max_response_tokens for suite in protocol.suites.values()]
        self._sequence_tokens = min(protocol.max_prompt_tokens + max(longest), model.positions or sys.maxsize)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        model = self.model
        engines = _InProcess(model) if isinstance(model, ModelFolder) else _OnServer(model)
        with AgentRollouts(self.settings, self.agent, engines, self.tokenizer, self._sequence_tokens) as rollouts:
            groups = rollouts.generate(prompts, sampling)
        pairs = zip(prompts, groups, strict=True)
        return [Sample(prompt, response) for prompt, group in pairs for response in group]


class _OnServer:
    """A server in the place of a run's engines: each request is a call in a thread of its own."""

    embedded = False

    def __init__(self, server: CompletionServer) -> None:
        self._server = server
        self._calls: dict[int, Future[Response]] = {}
        self._numbers = count()

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
        numbers = list(islice(self._numbers, len(prompts)))
        for place, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
            self._calls[number] = self._server.respond(prompt.token_ids, sampling.reseeded(place))
        return numbers

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        """Raises UserError if the server is gone."""
        calls = {self._calls[number]: number for number in ids}
        ended = wait(calls, timeout=seconds, return_when=FIRST_COMPLETED).done
        for call in ended:
            call.result()
        return {calls[call] for call in ended}

    def take(self, request: int) -> list[Response]:
        return [self._calls.pop(request).result()]

    def abort(self, ids: Iterable[int]) -> None: ...

    def cancel(self, ids: Iterable[int]) -> None:
        for request in ids:
            self._calls.pop(request).cancel()


class _InProcess:
    """The model of this process in the place of a run's engines. It has answered when `submit` returns."""

    embedded = True

    def __init__(self, model: ModelFolder) -> None:
        self._model = model
        self._answers: dict[int, list[Response]] = {}
        self._numbers = count()

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
        groups = self._model.engine().generate([prompt.token_ids for prompt in prompts], sampling)
        numbers = list(islice(self._numbers, len(prompts)))
        self._answers |= zip(numbers, groups, strict=True)
        return numbers

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        return set(ids)

    def take(self, request: int) -> list[Response]:
        return self._answers.pop(request)

    def abort(self, ids: Iterable[int]) -> None: ...

    def cancel(self, ids: Iterable[int]) -> None:
        for request in ids:
            self._answers.pop(request, None)
