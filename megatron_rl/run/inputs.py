"""The checks of everything that a run reads, in one order: a run and a dry run both go through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_rl.agent.resolve import load_agent
from megatron_rl.config import Config, check_inputs
from megatron_rl.config.reward import REMOTE, VERIFIERS
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.models.layout_check import check_layout
from megatron_rl.models.weights_check import check_weights
from megatron_rl.reward.grader import check_reward
from megatron_rl.reward.trial import try_reward
from megatron_rl.run.models import check_reference, model_folders
from megatron_rl.run.prompts import RunPrompts, load_run_prompts
from megatron_rl.run.tokens import check_tokens
from megatron_rl.run.traces import check_traces


class InputChecks:
    """The checks of one configuration. Nothing is started but a trial call of the user's own reward, and nothing is
    written."""

    def __init__(self, config: Config, *, complete: bool = True) -> None:
        """complete: whether `prepare` has run and the model folder must hold weights; a dry run needs neither."""
        self.config, self.complete = config, complete
        self.tokenizer: Any = None
        self.stop_token_ids: tuple[int, ...] = ()
        self.probes: dict[str, tuple[int, int]] = {}
        """Name -> (preceding token, token whose probability is measured after it)."""
        self.prompts: RunPrompts | None = None
        """This and the above are set by the check of prompts and labels."""

    def in_order(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yields the name of each check, and a function that raises UserError. The cheapest come first."""
        yield "files", lambda: check_inputs(self.config, prepared=self.complete, weights=self.complete)
        yield "reward", lambda: check_reward(self.config.reward)
        if self.config.rollout.agent:
            yield "agent", self._agent
        yield "the model's layout", self._layout
        yield "weights", self._weights
        yield "traces of the warm start", lambda: check_traces(self.config)
        yield "prompts and labels", self._prompts
        if self.config.reward.name not in (*VERIFIERS, REMOTE):
            yield "a trial call of the reward", self._trial

    def _agent(self) -> None:
        assert self.config.rollout.agent
        load_agent(self.config.rollout.agent)

    def _layout(self) -> None:
        check_layout(self.config)
        check_reference(self.config)

    def _weights(self) -> None:
        for folder in model_folders(self.config):
            check_weights(folder)

    def _prompts(self) -> None:
        self.tokenizer = load_tokenizer(self.config.model.path)
        self.stop_token_ids, self.probes = check_tokens(self.config, self.tokenizer)
        self.prompts = load_run_prompts(self.config, self.tokenizer)

    def _trial(self) -> None:
        assert self.prompts
        try_reward(self.config.reward, self.prompts.train.prompts[0])
