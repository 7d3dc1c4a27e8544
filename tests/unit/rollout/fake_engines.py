"""Engines without a model: a response has a random length, and its tokens tell where they belong."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_rl.types import Prompt, Response, SamplingParams


@dataclass
class Request:
    prompt: int
    partial: list[Response]
    responses: list[Response]
    lengths: list[int]


class FakeEngines:
    """The interface of `cluster.engines.Engines`. Response k of prompt p is p, k, 2, 3, 4, ...; a prompt's number is
    its only token. Each `tick` adds a token to some responses of every request; sometimes a request loses all of its
    tokens. Tokens 4, 8, ... are a tool's: the policy did not sample them.
    """

    def __init__(self, seed: int, *, embedded: bool, longest: int = 6) -> None:
        self.random, self.embedded, self.longest = random.Random(seed), embedded, longest
        self.version = 0
        self.requests: dict[int, Request] = {}
        self.answers: dict[int, list[Response]] = {}
        self.submitted = 0
        self.min_groups: int | None = None

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: Sequence[tuple[Response, ...]] | None = None,
        min_groups: int | None = None,
    ) -> list[int]:
        numbers = list(range(self.submitted, self.submitted + len(prompts)))
        self.submitted += len(prompts)
        self.min_groups = min_groups
        for number, prompt, before in zip(numbers, prompts, partial or [()] * len(prompts), strict=True):
            row = prompt.token_ids[0]
            nothing = [Response([row, k], [0.0, 0.0], "abort", self.version) for k in range(sampling.n)]
            # Lengths differ from one request to the next, because another sampling would end elsewhere.
            lengths = [self.random.randint(3, self.longest) for _ in range(sampling.n)]
            start = list(before) if before else nothing
            lengths = [max(length, len(response)) for length, response in zip(lengths, start, strict=True)]
            self.requests[number] = Request(row, list(before), start, lengths)
        return numbers

    def tick(self) -> None:
        for number, request in list(self.requests.items()):
            if self.random.random() < 0.05:  # its engine is lost
                nothing = [
                    Response([request.prompt, k], [0.0, 0.0], "abort", self.version)
                    for k in range(len(request.responses))
                ]
                request.responses = list(request.partial) or nothing
            for k, response in enumerate(request.responses):
                if response.finish_reason == "abort" and self.random.random() < 0.7:
                    request.responses[k] = self._longer(response, request.lengths[k])
            if all(response.finish_reason != "abort" for response in request.responses):
                self.answers[number] = self.requests.pop(number).responses
        if self.embedded and self.min_groups is not None and len(self.answers) >= self.min_groups:
            self.abort(self.requests)

    def _longer(self, response: Response, length: int) -> Response:
        done = len(response)
        last = done + 1 >= length
        return response.followed_by(
            Response([done], [-0.1], "stop" if last else "abort", self.version, sampled_mask=[done % 4 != 0])
        )

    def wait(self, numbers: Iterable[int]) -> set[int]:
        numbers = set(numbers)
        while not (ready := numbers & self.answers.keys()) or (self.embedded and ready != numbers):
            self.tick()
        return ready

    def take(self, number: int) -> list[Response]:
        return self.answers.pop(number)

    def abort(self, numbers: Iterable[int]) -> None:
        for number in [number for number in numbers if number in self.requests]:
            self.answers[number] = self.requests.pop(number).responses

    def suspend(self, numbers: Iterable[int]) -> set[int]:
        numbers = set(numbers)
        self.abort(numbers)
        return numbers
