"""`megatron-rl plan`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from rich.console import Console

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.plan.hardware import GPUS, Assumptions
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.search import layouts, nearest
from megatron_rl.plan.setup import Setup
from megatron_rl.plan.show import show_layouts, show_plan

USUAL_PROMPT = 200
"""Tokens; problems of mathematics are about that long."""
SHOWN = 12


def print_plan(config: Config, *, assumptions: list[str], search: bool, as_json: bool) -> None:
    """Raises UserError where the configuration cannot be planned for; not where it does not fit: that is the plan."""
    setup = Setup.of(config, GPUS[config.cluster.gpu], _assumed(config, assumptions))
    plan = Plan(setup)
    if search:
        found = layouts(setup)
        if as_json:
            shown = [{"overrides": choice.overrides} | plan.as_json() for choice, plan in found[:SHOWN]]
            print(json.dumps(shown, indent=2))
        else:
            show_layouts(found, SHOWN, Console())
    elif as_json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show_plan(plan, nearest(setup) if plan.problems else [], Console())


def _assumed(config: Config, texts: list[str]) -> Assumptions:
    """What is given, and for lengths a guess: a third of the longest response."""
    values: dict[str, Any] = {
        "mean_prompt": min(USUAL_PROMPT, config.data.max_prompt_tokens / 2),
        "mean_response": config.rollout.max_response_tokens / 3,
    }
    known = {field.name for field in fields(Assumptions)}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise UserError(f"--assume {text}: expected NAME=VALUE, NAME one of {', '.join(sorted(known))}")
        if name == "transformer_engine" and value in ("true", "false"):
            values[name] = value == "true"
            continue
        try:
            values[name] = float(value)
        except ValueError:
            raise UserError(f"--assume {text}: {value!r} is not a number") from None
    return Assumptions(**values)
