"""The rows of several prompts that the embedded engine samples at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.rollout.engines.interface import response_of
from megatron_rl.types import FinishReason, Response, SamplingParams


class Batch:
    """The unfinished responses of several groups, one row each: R rows."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Response]],
        sampling: SamplingParams,
        device: torch.device,
    ) -> None:
        self._prompts, self._groups, self._device = prompts, groups, device
        self._places = [
            (g, k)
            for g, group in enumerate(groups)
            for k, response in enumerate(group)
            if response.finish_reason == "abort"
        ]
        left = [sampling.max_tokens - len(groups[g][k]) for g, k in self._places]
        self.limits = torch.tensor(left, dtype=torch.int64, device=device)
        """[R], tokens that each row may still get; 0 if it was aborted right before it had all."""
        rows, longest = len(left), max(left, default=0)
        self.tokens = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(rows, longest, device=device)
        self._lengths = [0] * rows
        self._reasons: list[FinishReason] = ["abort"] * rows
        self._open = [sum(response.finish_reason == "abort" for response in group) for group in groups]
        self.complete = self._open.count(0)
        """Number of groups all of whose responses are complete."""

    @property
    def rows(self) -> int:
        return len(self._places)

    def prefixes(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens [P, L] padded on the left, a mask [P, L] of 1 for tokens that are not padding (None: there is no
        padding), and lengths [P].

        P is R, or the number of prompts if no response has tokens yet, as the rows of a prompt then share its prefix.
        """
        fresh = self.complete == 0 and not any(len(self._groups[g][k]) for g, k in self._places)
        texts = (
            [list(prompt) for prompt in self._prompts]
            if fresh and len(set(self._open)) == 1
            else [[*self._prompts[g], *self._groups[g][k].token_ids.tolist()] for g, k in self._places]
        )
        longest = max(map(len, texts))
        tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        mask = torch.arange(longest, device=self._device) >= longest - lengths[:, None]
        return tokens, None if bool(mask.all()) else mask.long(), lengths

    def end(self, rows: Tensor, length: int, stopped: Tensor) -> None:
        """Completes these rows `length` tokens after their prefixes: by a stop token, or at their limits."""
        for row, stop in zip(rows.tolist(), stopped.tolist(), strict=True):
            self._lengths[row], self._reasons[row] = length, "stop" if stop else "length"
            group = self._places[row][0]
            self._open[group] -= 1
            self.complete += self._open[group] == 0

    def abort(self, rows: Tensor, length: int) -> None:
        """Stops these rows unfinished, `length` tokens after their prefixes."""
        for row in rows.tolist():
            self._lengths[row] = length

    def responses(self, version: int) -> list[list[Response]]:
        """The responses of each group, continued by the tokens that weights of this version sampled."""
        groups = [list(group) for group in self._groups]
        tokens, log_probs = self.tokens.int().cpu().numpy(), self.log_probs.cpu().numpy()
        for row, ((g, k), length, reason) in enumerate(zip(self._places, self._lengths, self._reasons, strict=True)):
            sampled = response_of(tokens[row, :length].copy(), log_probs[row, :length].copy(), reason, version)
            groups[g][k] = groups[g][k].followed_by(sampled) if len(groups[g][k]) else sampled
        return groups
