"""Evaluation with an agent: a model folder in this process, and an agent that asks it in several turns."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.evaluation import ProtocolSettings
from megatron_rl.evaluation.sources import ModelFolder
from megatron_rl.types import Prompt, Response, Sample, SamplingParams


class AgentSource:
    """Samples responses with the protocol's agent. See `Source`."""

    def __init__(self, model: ModelFolder, protocol: ProtocolSettings) -> None:
        """Raises UserError if the agent cannot be imported."""
        assert protocol.agent
        self.model, self.settings, self.agent = model, protocol.agent, load_agent(protocol.agent)
        self.identity, self.tokenizer, self.decode = model.identity, model.tokenizer, model.decode
        self.stop, self.vocabulary, self.positions = model.stop, model.vocabulary, model.positions
        longest = [suite.max_response_tokens or protocol.max_response_tokens for suite in protocol.suites.values()]
        self._sequence_tokens = min(protocol.max_prompt_tokens + max(longest), model.positions or sys.maxsize)

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        engines = _InProcess(self.model)
        with AgentRollouts(self.settings, self.agent, engines, self.tokenizer, self._sequence_tokens) as rollouts:
            groups = rollouts.generate(prompts, sampling)
        pairs = zip(prompts, groups, strict=True)
        return [Sample(prompt, response) for prompt, group in pairs for response in group]


class _InProcess:
    """The model of this process in the place of a run's engines. It has answered when `submit` returns."""

    embedded = True

    def __init__(self, model: ModelFolder) -> None:
        self._model = model
        self._answers: dict[int, list[Response]] = {}
        self._asked = 0

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
        groups = self._model.engine().generate([prompt.token_ids for prompt in prompts], sampling)
        numbers = list(range(self._asked, self._asked + len(prompts)))
        self._asked += len(prompts)
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
