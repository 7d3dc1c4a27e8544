"""A server with the part of SGLang's HTTP interface that an engine uses, which fails on command. It computes nothing:
the behaviour of real servers is tested with real servers."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.quiet_server import QuietServer

END_TOKEN = 2
"""The model's own end token; a response of this server ends with it after `length` tokens."""


@dataclass
class Script:
    """Faults of the next requests, and a record of the requests so far."""

    faults: deque[str] = field(default_factory=deque)
    """Fault of each next request to /generate: error, drop, slow, short, refuse, stale, damaged; once they are used up,
    answers are good."""
    update_faults: deque[str] = field(default_factory=deque)
    """Fault of each next weight update: error, drop, slow; once they are used up, updates succeed."""
    abort_faults: int = 0
    """Number of the next calls to abort that are answered with status 500."""
    length: int = 5
    seconds: float = 0.0
    """Time that a good answer takes."""
    unfrozen: bool = False
    speculates: bool = False
    """Whether each answer says that 4 tokens were proposed for it and 3 accepted."""
    healthy: bool = True
    version: str = "-1"
    requests: list[dict[str, Any]] = field(default_factory=list)
    control: list[tuple[Any, ...]] = field(default_factory=list)
    """Path and body of each call about memory or weights."""
    abort: threading.Event = field(default_factory=threading.Event)
    answered: int = 0
    """Number of requests to /generate whose answer has been written."""
    looks: int = 0
    """Number of times that the weight version was asked for."""


class _Handler(BaseHTTPRequestHandler):
    script: Script
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health_generate":
            if not self.script.healthy:
                time.sleep(30)
            self._answer(200, {})
        else:
            self._answer(200, {"weight_version": self.script.version})
            self.script.looks += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/generate":
            self._generate(body)
            self.script.answered += 1
        elif self.path == "/abort_request" and self.script.abort_faults:
            self.script.abort_faults -= 1
            self._answer(500, {"error": "told to fail"})
        elif self.path == "/abort_request":
            self.script.abort.set()
            self._answer(200, {})
        elif self.path == "/update_weights_from_disk":
            self.script.control.append((self.path, body["weight_version"]))
            self._update(body)
        elif self.path in ("/pause_generation", "/continue_generation"):
            self.script.control.append((self.path, body.get("mode")))
            if self.path == "/continue_generation":
                self.script.unfrozen = True
                self.script.abort.set()
            self._answer(200, {})
        elif self.path.startswith("/flush_cache?timeout="):
            self.script.control.append(("/flush_cache", None))
            self._answer(200, {})
        elif self.path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self.script.control.append((self.path, body["tags"]))
            self._answer(200, {})

    def _update(self, body: dict[str, Any]) -> None:
        fault = self.script.update_faults.popleft() if self.script.update_faults else ""
        if fault == "slow":
            time.sleep(5)
        if fault == "drop":
            self.close_connection = True
        elif fault == "error":
            self._answer(500, {"error": "out of memory"})
        else:
            self.script.version = body["weight_version"]
            self._answer(200, {"success": True})

    def _generate(self, body: dict[str, Any]) -> None:
        script = self.script
        script.requests.append(body)
        fault = script.faults.popleft() if script.faults else ""
        if fault == "slow":
            time.sleep(5)
        if fault == "drop":
            self.close_connection = True
            return
        if fault in ("error", "refuse"):
            self._answer({"error": 500, "refuse": 400}[fault], {"error": f"told to {fault}"})
            return
        version = "-7" if fault == "stale" else script.version
        start, script_version = len(body["input_ids"]), version
        stopped = script.seconds > 0 and script.abort.wait(script.seconds)
        aborted = stopped and not script.unfrozen
        if aborted:
            script.abort.clear()
        params = body["sampling_params"]
        count = min(params["max_new_tokens"], script.length)
        tokens = [100 + start + i for i in range(2 if aborted else count)]
        reason = "abort" if aborted else "length"
        if not aborted and count == script.length:
            tokens[-1], reason = END_TOKEN, "stop"
        log_probs = [[-0.1, token, None] for token in tokens[: 1 if fault == "short" else None]]
        spans = [{"version": script_version, "start": 0, "end": len(tokens)}]
        if stopped and not aborted and len(tokens) > 2:  # it was frozen after two tokens
            spans = [spans[0] | {"end": 2}, {"version": script.version, "start": 2, "end": len(tokens)}]
        meta = {"finish_reason": {"type": reason}, "output_token_logprobs": log_probs, "weight_versions": spans}
        if script.speculates:
            meta |= {"spec_num_proposed_drafts": 4, "spec_num_correct_drafts": 3}
        answers = [{"output_ids": tokens, "meta_info": meta}] * params["n"]
        self._answer(200, answers, cut_off=5 if fault == "damaged" else 0)

    def _answer(self, status: int, body: Any, cut_off: int = 0) -> None:
        data = json.dumps(body).encode()
        data = data[: len(data) - cut_off]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


@contextmanager
def faulty_server() -> Iterator[tuple[str, Script]]:
    """Gives the server's URL and its script."""
    script = Script()
    server = QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"script": script}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", script
    finally:
        server.shutdown()
        server.server_close()
