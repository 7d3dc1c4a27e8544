"""What the embedded engine samples at a time: rows of several prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.types import FinishReason, Generation, SamplingParams


class Batch:
    """The unfinished responses of some groups, a row each: R rows."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        groups: Sequence[Sequence[Generation]],
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
        left = [sampling.max_tokens - len(groups[g][k].token_ids) for g, k in self._places]
        self.limits = torch.tensor(left, dtype=torch.int64, device=device)
        """[R], tokens that each may yet have; 0 where it was cut when it had all."""
        rows, longest = len(left), max(left, default=0)
        self.tokens = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(rows, longest, device=device)
        self._lengths = [0] * rows
        self._reasons: list[FinishReason] = ["abort"] * rows
        self._open = [sum(response.finish_reason == "abort" for response in group) for group in groups]
        self.whole = self._open.count(0)
        """Groups without a row that has yet to end."""

    @property
    def rows(self) -> int:
        return len(self._places)

    def prefixes(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens [P, L] padded on the left, 1 where they are no padding (None: everywhere), and lengths [P].

        P is R, or the prompts, where nothing is begun yet and the rows of each share its prefix.
        """
        fresh = self.whole == 0 and not any(self._groups[g][k].token_ids for g, k in self._places)
        texts = (
            [list(prompt) for prompt in self._prompts]
            if fresh and len(set(self._open)) == 1
            else [[*self._prompts[g], *self._groups[g][k].token_ids] for g, k in self._places]
        )
        longest = max(map(len, texts))
        tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        there = torch.arange(longest, device=self._device) >= longest - lengths[:, None]
        return tokens, None if bool(there.all()) else there.long(), lengths

    def end(self, rows: Tensor, length: int, stopped: Tensor) -> None:
        """These rows are done, `length` tokens after their prefixes: by a stop token, or at their limits."""
        for row, stop in zip(rows.tolist(), stopped.tolist(), strict=True):
            self._lengths[row], self._reasons[row] = length, "stop" if stop else "length"
            group = self._places[row][0]
            self._open[group] -= 1
            self.whole += self._open[group] == 0

    def cut(self, rows: Tensor, length: int) -> None:
        """These rows stop here, unfinished."""
        for row in rows.tolist():
            self._lengths[row] = length

    def responses(self, version: int) -> list[list[Generation]]:
        """Of each group, with what was sampled of it, by weights of this version."""
        groups = [list(group) for group in self._groups]
        rows = zip(
            self._places, self.tokens.tolist(), self.log_probs.tolist(), self._lengths, self._reasons, strict=True
        )
        for (g, k), tokens, log_probs, length, reason in rows:
            sampled = Generation(tokens[:length], log_probs[:length], reason, version)
            groups[g][k] = groups[g][k].followed_by(sampled) if groups[g][k].token_ids else sampled
        return groups
