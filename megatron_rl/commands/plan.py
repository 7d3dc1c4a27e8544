"""`megatron-rl plan`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from rich.console import Console

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.search import layouts, nearest
from megatron_rl.plan.setup import setup_of
from megatron_rl.plan.show import show_layouts, show_plan

SHOWN = 12


def print_plan(config: Config, *, assumptions: list[str], search: bool, as_json: bool) -> None:
    """Raises UserError where the configuration cannot be planned for; not where it does not fit: that is the plan."""
    setup = setup_of(config, **_assumed(assumptions))
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


def _assumed(texts: list[str]) -> dict[str, Any]:
    """What is given, by its name in `Assumptions`."""
    values: dict[str, Any] = {}
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
    return values
