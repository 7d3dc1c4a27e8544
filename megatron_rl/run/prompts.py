"""The prompts of a run, each held to what model and verifier can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.limits import Limits
from megatron_rl.data.prompts import PromptSet, load_prompts
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config
from megatron_rl.reward.labels import label_check
from megatron_rl.types import Prompt


@dataclass(frozen=True, slots=True)
class RunPrompts:
    """The prompts of training and of every suite."""

    train: PromptSet
    suites: dict[str, PromptSet]


def load_run_prompts(config: Config, tokenizer: Any) -> RunPrompts:
    """Reads the data files of a run. Raises UserError with file and row for a prompt or label that cannot be used."""
    rollout, evaluation = config.rollout, config.evaluation
    train = _load(config, tokenizer, None, rollout.max_response_tokens, "rollout.max_response_tokens")
    suites = {}
    for name, suite in evaluation.suites.items():
        own = f"evaluation.suites.{name}.max_response_tokens"
        limit, key = next(
            (limit, key)
            for limit, key in (
                (suite.max_response_tokens, own),
                (evaluation.max_response_tokens, "evaluation.max_response_tokens"),
                (rollout.max_response_tokens, "rollout.max_response_tokens"),
            )
            if limit is not None
        )
        suites[name] = _load(config, tokenizer, name, limit, key)
    return RunPrompts(train, suites)


def longest_response(config: Config) -> int:
    """Returns the most tokens that a response of the run may have, in training and in every suite."""
    common = config.evaluation.max_response_tokens or config.rollout.max_response_tokens
    suites = [suite.max_response_tokens or common for suite in config.evaluation.suites.values()]
    return max([config.rollout.max_response_tokens, *suites])


def positions_of(config: Config) -> int:
    """Returns the longest sequence that the run may give the model."""
    return config.model.max_positions or Architecture.from_hf(read_config(config.model.path)).max_positions


def _load(config: Config, tokenizer: Any, suite: str | None, response_tokens: int, key: str) -> PromptSet:
    model = Architecture.from_hf(read_config(config.model.path))
    limits = Limits(model.vocabulary, config.model.max_positions or model.max_positions, response_tokens, key)
    check_label = label_check(config.reward)
    agent = config.rollout.agent

    def check(prompt: Prompt) -> None:
        limits.check(prompt)
        if agent:
            agent.check_columns(prompt.metadata)
        if check_label:
            check_label(prompt)

    path = config.evaluation.suites[suite].data if suite else config.data.train
    return load_prompts(path, tokenizer=tokenizer, settings=config.data, check=check)
