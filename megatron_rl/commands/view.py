"""`megatron-rl view`: serves the reports of all runs in a folder to a browser on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PORT = 8060


def add(commands: Any) -> None:
    """Declares `view`."""
    parser = commands.add_parser("view", help="serve the reports of all runs in a folder, live, on this machine only")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="default: runs")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 takes a free one")
    parser.set_defaults(command=_view)


def _view(options: argparse.Namespace) -> None:
    from megatron_rl.observability.serve import server

    with server(options.folder, options.port) as serving:
        host, port = serving.server_address[:2]
        print(f"http://{host!s}:{port}/ shows the runs in {options.folder}; Ctrl-C ends it", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print("ended")
