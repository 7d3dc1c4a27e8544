"""Prints every route of a server's application, websockets and routes without documentation included.

python -m tests.engines.their_routes sglang|vllm
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

WEBSOCKET = "WEBSOCKET"


def sglang_app() -> Any:
    from sglang.srt.entrypoints.http_server import app

    return app


def vllm_app() -> Any:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # as the run does: weight updates over HTTP
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"]), ("generate",))


def routes(router: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (method, path), with values in place of parameters; also those of mounted applications."""
    for route in router.routes:
        path = prefix + re.sub(r"\{[^}]*\}", "1", route.path)
        kind = type(route).__name__
        if kind == "Mount":
            yield "GET", path
            yield from routes(route, path)
        elif "WebSocket" in kind:
            yield WEBSOCKET, path
        else:
            yield from ((method, path) for method in route.methods)


if __name__ == "__main__":
    print("routes:", json.dumps(sorted(set(routes(sglang_app() if sys.argv[1] == "sglang" else vllm_app())))))
