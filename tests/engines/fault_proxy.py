"""A proxy between an engine and a real server that forwards requests, and fails on command."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler

from megatron_rl.rollout.servers.http_engine import HttpEngine
from tests.quiet_server import QuietServer

SLOW_SECONDS = 25.0
"""Longer than the time for which the engines of the tests wait for an answer."""


@dataclass
class Script:
    """The server behind the proxy, and the faults that the next requests meet."""

    server: HttpEngine
    faults: dict[str, deque[str]] = field(default_factory=dict)
    """Fault of each next request to a path. An empty fault, or none left: the request is forwarded.

    error: it is answered with status 500. drop: the connection is closed. lost: the connection is closed once the
    server has answered. slow: it is delayed. down: from here on each request to this path is answered with status 500,
    until another engine is attached. restarted: from here on `successor` is behind the proxy.
    """
    successor: HttpEngine | None = None
    down: str = ""
    met: Counter[str] = field(default_factory=Counter)
    bodies: list[tuple[str, bytes]] = field(default_factory=list)
    """Path and body of each request so far."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str, update_path: str) -> str:
        """Returns the fault of a request to the path."""
        with self.lock:
            if path == update_path:
                self.down = ""  # a new engine gets weights before it sends any request
            if path == self.down:
                return "error"
            waiting = self.faults.get(path)
            fault = waiting.popleft() if waiting else ""
            if fault:
                self.met[f"{fault} {path}"] += 1
            if fault == "down":
                self.down = path
                return "error"
            if fault == "restarted":
                assert self.successor is not None
                self.server = self.successor
            return fault


class _Handler(BaseHTTPRequestHandler):
    script: Script
    update_path: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._forward()

    def do_POST(self) -> None:
        self._forward()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.script.bodies.append((self.path, body))
        fault = self.script.fault(self.path, self.update_path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "error":
            self._answer(500, "text/plain", b"the proxy was told to fail")
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        address = self.script.server._server._http.address
        server = HTTPConnection(address.url.removeprefix("http://"))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {address.key}"}
        try:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, answer.headers.get("Content-Type", "text/plain"), data)

    def _answer(self, status: int, content_type: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextmanager
def fault_proxy(script: Script, update_path: str) -> Iterator[str]:
    """Gives the proxy's URL."""
    handler = type("Handler", (_Handler,), {"script": script, "update_path": update_path})
    proxy = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
