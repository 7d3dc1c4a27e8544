"""The dashboard of `megatron-rl view`: a table of all runs in a folder, and the report of each, on loopback only.

Reports are written when they are asked for, from the run's files as they are then. The page of a run in progress loads
itself again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import FILE_NAME as METRICS
from megatron_rl.observability.metrics import metric_names, series
from megatron_rl.observability.report.page import environment, render
from megatron_rl.observability.report.run_data import read_run
from megatron_rl.observability.state import FILE_NAME as STATE
from megatron_rl.observability.state import read_state, seconds_left
from megatron_rl.utils.format import duration, number

REFRESH_SECONDS = 30
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in the table of the start page, as text."""

    name: str
    method: str
    step: str
    reward: str
    accuracy: str
    state: str
    left: str
    changed: float
    """Unix seconds of the last change of its metrics or state."""


def run_folders(root: Path) -> dict[str, Path]:
    """Returns the runs in a folder by name, or the run that the folder itself holds. Raises UserError without any."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give a folder of runs, such as runs, or the folder of one run.")
    found = {path.parent.name: path.parent for path in sorted(root.glob("*/config.yaml"))}
    if (root / "config.yaml").is_file():
        found = {root.resolve().name: root}
    if not found:
        raise UserError(f"{root} holds no runs: a run's folder has a config.yaml. Give a folder such as runs.")
    return found


def run_line(name: str, folder: Path, now: float) -> RunLine:
    """Returns the line of a run. Raises UserError if its files are broken."""
    run, state = read_run(folder), read_state(folder)
    rewards = series(run.rows, "reward/mean")[1][-10:]
    suites = [metric for metric in metric_names(run.rows) if metric.startswith("eval/") and "/avg@" in metric]
    accuracy = [f"{metric.split('/')[1]} {number(series(run.rows, metric)[1][-1])}" for metric in suites]
    step, total = max((row["step"] for row in run.rows), default=0), run.setting("train", "steps")
    in_progress = state is not None and state.ended is None
    return RunLine(
        name=name,
        method=str(run.setting("algorithm", "name") or ""),
        step=f"{step} of {total}" if total is not None else str(step),
        reward=number(sum(rewards) / len(rewards)) if rewards else "",
        accuracy=", ".join(accuracy),
        state="not known" if state is None else state.ended or state.phase,
        left=duration(seconds_left(run.rows, state.total_steps, now)) if in_progress and state else "",
        changed=_changed(folder),
    )


def start_page(root: Path) -> str:
    """Returns the table of all runs, those that changed last first. The line of a broken run says what is broken."""
    now = time.time()
    lines = [_line(name, folder, now) for name, folder in run_folders(root).items()]
    lines.sort(key=lambda line: -line.changed)
    ages = {line.name: duration(now - line.changed) for line in lines if line.changed}
    page = environment().get_template("runs.html.j2")
    return page.render(runs=lines, ages=ages, folder=str(root), refresh=REFRESH_SECONDS)


def _line(name: str, folder: Path, now: float) -> RunLine:
    try:
        return run_line(name, folder, now)
    except UserError as error:
        return RunLine(name, "", "", "", "", f"broken: {error}", "", _changed(folder))


def report_page(folders: Sequence[Path]) -> str:
    """Returns the report of one run, or of several side by side."""
    states = [read_state(folder) for folder in folders]
    refresh = REFRESH_SECONDS if any(state and state.ended is None for state in states) else 0
    return _rendered(tuple(folders), tuple(map(_changed, folders)), refresh)


@lru_cache(maxsize=4)
def _rendered(folders: tuple[Path, ...], _changes: tuple[float, ...], refresh: int) -> str:
    return render([read_run(folder) for folder in folders], refresh)


def _changed(folder: Path) -> float:
    files = [folder / METRICS, folder / STATE]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def answer(root: Path, address: str) -> str | None:
    """Returns the page of an address (`/`, `/run/NAME`, `/compare?run=A&run=B`), or None if there is none."""
    parts = urlsplit(address)
    runs: Mapping[str, Path] = run_folders(root)
    if parts.path == "/":
        return start_page(root)
    if parts.path.startswith("/run/"):
        names = [unquote(parts.path.removeprefix("/run/"))]
    elif parts.path == "/compare":
        names = parse_qs(parts.query).get("run", [])
    else:
        return None
    if not names or any(name not in runs for name in names):
        return None
    return report_page([runs[name] for name in names])


def server(root: Path, port: int) -> ThreadingHTTPServer:
    """Returns a server on 127.0.0.1 that is ready to serve. Port 0 takes a free one.

    Raises UserError if there are no runs, the port is taken, or there is no such port.
    """
    if not 0 <= port <= 65535:
        raise UserError(
            f"port {port}: there is no such port. Choose one from 1 to 65535 with --port, or 0 for a free one."
        )
    run_folders(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site can make a browser ask for its own host name at this address.
            if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in LOOPBACK:
                self._send(HTTPStatus.FORBIDDEN, "only served on loopback")
                return
            try:
                page = answer(root, self.path)
            except UserError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
                return
            if page is None:
                self._send(HTTPStatus.NOT_FOUND, "no such run")
            else:
                self._send(HTTPStatus.OK, page, "text/html")

        def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Prints nothing: requests are no news."""

    try:
        return ThreadingHTTPServer((LOOPBACK[0], port), Handler)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}. Choose another with --port, or 0 for a free one.") from error
