"""Parses command lines of servers by the servers' own parsers, as released, and prints what they make of them.

    python -m tests.engines.their_parsers sglang|vllm|router FILE

FILE has a JSON list of {"arguments": [...], "environment": {...}}. The answer has one dictionary for each: every
setting that is a text, a number or a list, or the reason for which the line is `refused`. No GPU is needed: only the
steps before a server looks at its devices run.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any


class Unknown(Exception):
    """A command line has an option or an environment variable that the server does not know."""


def known(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Raises Unknown for an option that the parser does not have under exactly this name: argparse also takes the
    beginning of a name, so that another option could be set instead of one that was removed."""
    unknown = [word for word in arguments if word.startswith("--") and word not in parser._option_string_actions]
    if unknown:
        raise Unknown(f"unknown options: {unknown}")


def sglang(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs, prepare_server_args
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    known(parser, [word for word in arguments if word != "--config"])
    if lacking := [name for name in environment if name.startswith("SGLANG_") and not read_by_sglang(name)]:
        raise Unknown(f"unknown environment variables: {lacking}")
    prepare_server_args(arguments)
    return vars(parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(arguments)))


@cache
def read_by_sglang(variable: str) -> bool:
    """Whether SGLang's sources have the name: SGLang has no complete list of its environment variables."""
    import sglang

    folder = Path(sglang.__path__[0]) / "srt"
    sources = (path.read_text() for path in folder.rglob("*.py"))
    return any(f'"{variable}"' in source or f"{variable} =" in source for source in sources)


def vllm(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.envs import environment_variables
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known(parser, arguments)
    if lacking := [name for name in environment if name.startswith("VLLM_") and name not in environment_variables]:
        raise Unknown(f"unknown environment variables: {lacking}")
    parsed = parser.parse_args(arguments)
    validate_parsed_serve_args(parsed)
    AsyncEngineArgs.from_cli_args(parsed)
    return vars(parsed)


def router(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    from sglang_router.launch_router import RouterArgs, parse_router_args

    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    known(parser, arguments)
    return vars(parse_router_args(arguments))


if __name__ == "__main__":
    parse = {"sglang": sglang, "vllm": vllm, "router": router}[sys.argv[1]]
    answers: list[dict[str, Any]] = []
    for case in json.loads(Path(sys.argv[2]).read_text()):
        try:
            answers.append(parse(case["arguments"], case["environment"]))
        except Unknown as unknown:
            answers.append({"refused": str(unknown)})
    plain = [
        {name: value for name, value in answer.items() if isinstance(value, str | int | float | list | bool | None)}
        for answer in answers
    ]
    print("parsed:", json.dumps(plain, default=str))
