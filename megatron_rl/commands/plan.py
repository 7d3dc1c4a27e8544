"""`megatron-rl plan`: memory, placement and time of a run before it starts."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

from .arguments import add_config, add_output, load_with_remarks, printed_to

if TYPE_CHECKING:
    from megatron_rl.config import Config

SHOWN = 12
"""Layouts that `--search` shows."""


def add(commands: Any) -> None:
    """Declares `plan`."""
    parser = commands.add_parser(
        "plan", help="estimate whether a run fits, where its processes go and how long it takes; needs no GPU"
    )
    add_config(parser)
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit the same GPUs")
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes and times in seconds")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace one assumption, such as mean_response=3000; may be repeated",
    )
    add_output(parser)
    parser.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    """Raises UserError if no plan can be made. A run that does not fit is no error: the plan shows it."""
    import json

    from rich.console import Console

    from megatron_rl.plan.plan import Plan
    from megatron_rl.plan.search import layouts, nearest
    from megatron_rl.plan.setup import setup_of
    from megatron_rl.plan.show import show_layouts, show_plan

    config = _with_model(load_with_remarks(options.config, options.overrides))
    setup = setup_of(config, **_assumptions(options.assume))
    plan = Plan(setup)
    with printed_to(options.output):
        if options.search:
            found = layouts(setup)
            if options.json:
                shown = [{"overrides": choice.overrides} | plan.as_json() for choice, plan in found[:SHOWN]]
                print(json.dumps(shown, indent=2))
            else:
                show_layouts(found, SHOWN, Console())
        elif options.json:
            print(json.dumps(plan.as_json(), indent=2))
        else:
            show_plan(plan, nearest(setup) if plan.problems else [], Console())


def _with_model(config: Config) -> Config:
    """Returns the configuration with the local copy of a model of the Hub, if there is one. Says if the plan has to use
    the published sizes of a model that is not here."""
    from megatron_rl.data.hub import is_hub_id, local_model
    from megatron_rl.models.published import published_config, published_name

    path = config.model.path
    if is_hub_id(path):
        with suppress(UserError):  # the model is not in the cache
            path = local_model(path, "model.path", download=False)
    if not path.is_dir() and published_config(path) is not None:
        print(f"{path} is not here: the plan uses the published sizes of {published_name(path)}", file=sys.stderr)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _assumptions(texts: list[str]) -> dict[str, Any]:
    """Returns the values of `--assume` by their names in `Assumptions`."""
    from dataclasses import fields

    from megatron_rl.plan.assumptions import Assumptions

    values: dict[str, Any] = {}
    known = {field.name for field in fields(Assumptions)}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise UserError(f"--assume {text}: expected NAME=VALUE, with NAME one of {', '.join(sorted(known))}")
        if name == "transformer_engine" and value in ("true", "false"):
            values[name] = value == "true"
            continue
        try:
            values[name] = float(value)
        except ValueError:
            raise UserError(f"--assume {text}: {value!r} is not a number") from None
    return values
