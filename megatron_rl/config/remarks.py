"""Remarks on a configuration: settings that are allowed but do nothing, or hardly what was meant."""

from __future__ import annotations

import sys

from lpreg.losses.registry import METHODS

from .evaluation import EvaluationSettings, ProtocolSettings
from .methods import section_key
from .schema import Config


def remarks(config: Config) -> list[str]:
    """Returns one sentence per setting that a user should know about."""
    unused = [f"{config.sources[key]}: {text}" for key, text in settings_not_in_use(config)]
    return [*unused, *aborted_requests(config), *greedy_samples(config.evaluation, "evaluation.")]


def aborted_requests(config: Config) -> list[str]:
    """Returns a sentence if an asynchronous run is to keep requests across weight updates, but cannot."""
    rollout = config.rollout
    if not rollout.asynchronous or rollout.recompute_kv_cache or config.keeps_requests:
        return []
    where = "servers behind a router" if rollout.server.router else f"the engine {rollout.engine}"
    return [
        f"rollout.recompute_kv_cache=false does nothing: {where} cannot keep requests across weight updates; they "
        "continue after another prefill"
    ]


def warn(config: Config) -> None:
    """Prints every remark on standard error."""
    for remark in remarks(config):
        print(f"warning: {remark}", file=sys.stderr)


def settings_not_in_use(config: Config) -> list[tuple[str, str]]:
    """Returns (key, sentence) for each setting of a method that is not the configured one.

    A file may have them, for example to switch methods by an override; given as an override they are an error.
    """
    used = section_key(config.algorithm)
    return [
        (key, f"{key} has no effect: it is a setting of {method}, and algorithm.name is {config.algorithm.name}")
        for key in config.sources
        if (method := _method_of(key)) is not None and method != used
    ]


def _method_of(key: str) -> str | None:
    parts = key.split(".")
    return parts[1] if len(parts) > 2 and parts[0] == "algorithm" and parts[1] in METHODS else None


def greedy_samples(settings: EvaluationSettings | ProtocolSettings, prefix: str = "") -> list[str]:
    """Returns a sentence per suite that takes several greedy samples, which are all the same."""
    suites = {name: suite.over(settings) for name, suite in settings.suites.items()}
    return [
        f"{prefix}suites.{name}: {suite.samples_per_prompt} samples per problem at temperature 0 are the same text "
        f"{suite.samples_per_prompt} times; set samples_per_prompt to 1 or raise the temperature"
        for name, suite in suites.items()
        if suite.temperature == 0 and (suite.samples_per_prompt or 1) > 1
    ]
