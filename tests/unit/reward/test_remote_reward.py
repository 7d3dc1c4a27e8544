"""Tests of the remote reward against well-behaved and faulty servers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from megatron_rl.config.reward import RemoteSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import open_grader
from megatron_rl.types import Prompt, Response, RewardResult, Sample
from tests.quiet_server import QuietServer

MakeSample = Callable[..., Sample]
Answer = Callable[[dict[str, Any], int], tuple[int, bytes] | None]
"""(request, number of requests before it) -> status and body; None: no answer at all."""


class Server:
    """Answers as `answer` does, and keeps the requests."""

    def __init__(self) -> None:
        self.answer: Answer = well_behaved
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                before = len(server.requests)
                server.requests.append(request)
                server.headers.append(dict(self.headers))
                answer = server.answer(request, before)
                if answer is None:
                    server.released.wait(5)
                    return
                status, body = answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


def well_behaved(request: dict[str, Any], _: int) -> tuple[int, bytes]:
    results = [{"score": float(s["response"] == s["label"]), "answer": s["response"]} for s in request["samples"]]
    return 200, json.dumps({"results": results}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()


def settings(url: str, **more: Any) -> RewardSettings:
    remote = {"url": url, "batch_size": 4, "timeout_seconds": 600.0, "retries": 3, "backoff_seconds": 0.01} | more
    return RewardSettings(name="remote", remote=RemoteSettings(**remote))


def test_samples_are_batched_and_results_keep_their_order(server: Server, make_sample: MakeSample) -> None:
    samples = [make_sample(str(i), str(i) if i % 3 else "other") for i in range(10)]
    with open_grader(settings(server.url)) as grader:
        results = grader.score(samples)
        assert grader.score([]) == []
    assert results == [RewardResult(float(i % 3 > 0), str(i), text=str(i)) for i in range(10)]
    assert sorted(len(request["samples"]) for request in server.requests) == [2, 4, 4]
    assert set(server.requests[0]["samples"][0]) == {"id", "prompt", "response", "label", "finish_reason"}


def test_temporary_failures_are_tried_again(server: Server, make_sample: MakeSample) -> None:
    server.answer = lambda request, before: (503, b"busy") if before < 2 else well_behaved(request, before)
    with open_grader(settings(server.url)) as grader:
        assert grader.score([make_sample("1", "1")]) == [RewardResult(1.0, "1", text="1")]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "attempts", "outcome", "detail"),
    [
        ((503, b"busy"), 4, "error", "status 503: busy"),
        ((400, b"bad"), 1, "error", "status 400: bad"),
        ((200, b"<html>"), 1, "error", "the answer is not JSON: "),
        ((200, b'{"results": []}'), 1, "error", "with 1 entries"),
        ((200, b'{"results": [{"score": "high"}]}'), 1, "error", "no finite score"),
        ((200, b'{"results": [{"score": NaN}]}'), 1, "error", "no finite score"),
        (None, 2, "timeout", "took too long"),
    ],
)
def test_failures_have_an_outcome_and_a_detail(
    server: Server,
    make_sample: MakeSample,
    answer: tuple[int, bytes] | None,
    attempts: int,
    outcome: str,
    detail: str,
) -> None:
    server.answer = lambda *_: answer
    more = {"timeout_seconds": 0.3, "retries": 1} if answer is None else {}
    with open_grader(settings(server.url, **more)) as grader:
        result = grader.score([make_sample("1", "1")])[0]
    assert (result.score, result.outcome, result.text) == (0.0, outcome, "1")
    assert detail in result.detail
    deadline = time.monotonic() + 600
    while len(server.requests) < attempts and time.monotonic() < deadline:
        time.sleep(0.01)  # on a busy machine the server may read a request after the client has given it up
    assert len(server.requests) == attempts


def test_a_bad_batch_costs_only_its_own_samples(server: Server, make_sample: MakeSample) -> None:
    def answer(request: dict[str, Any], before: int) -> tuple[int, bytes]:
        return (400, b"no") if request["samples"][0]["label"] == "4" else well_behaved(request, before)

    server.answer = answer
    with open_grader(settings(server.url)) as grader:
        results = grader.score([make_sample(str(i), str(i)) for i in range(12)])
    assert [result.outcome for result in results] == ["score"] * 4 + ["error"] * 4 + ["score"] * 4


def test_a_result_without_a_score_costs_only_its_own_sample(server: Server, make_sample: MakeSample) -> None:
    scores = ["true", "NaN", "null", "2", "1e999"]
    body = '{"results": [' + ", ".join(f'{{"score": {score}}}' for score in scores) + "]}"
    server.answer = lambda *_: (200, body.encode())
    with open_grader(settings(server.url, batch_size=5)) as grader:
        results = grader.score([make_sample(score) for score in scores])
    assert [result.score for result in results] == [1, 0, 0, 2, 0]
    assert [result.outcome for result in results] == ["score", "error", "error", "score", "error"]
    assert "result 1 of the server" in results[1].detail and "NoneType" in results[2].detail


def test_a_server_that_is_gone_is_an_error(server: Server, make_sample: MakeSample) -> None:
    server.http.server_close()
    with open_grader(settings(server.url, retries=1)) as grader:
        result = grader.score([make_sample("1", "1")])[0]
    assert result.outcome == "error" and "refused" in result.detail


def test_the_token_comes_from_the_environment(
    server: Server, make_sample: MakeSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "abc")
    with open_grader(settings(server.url, token_variable="MY_TOKEN")) as grader:
        grader.score([make_sample("1", "1")])
    assert server.headers[0]["Authorization"] == "Bearer abc"
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UserError, match="MY_TOKEN is not set"):
        open_grader(settings(server.url, token_variable="MY_TOKEN"))


def test_a_url_that_is_not_http_is_refused() -> None:
    with pytest.raises(UserError, match="must begin with http"):
        open_grader(settings("file:///etc/passwd"))


def test_responses_are_decoded_before_they_are_sent(server: Server) -> None:
    """The server and the results get the text of the tokens."""
    samples = [Sample(Prompt(f"p:{i}", (1,), "", "4+5"), Response([4, 5 + i], [], "stop", 0)) for i in range(2)]
    with open_grader(settings(server.url), decode=lambda ids: "+".join(map(str, ids))) as grader:
        results = grader.score(samples)
    assert [sample["response"] for request in server.requests for sample in request["samples"]] == ["4+5", "4+6"]
    assert [(result.score, result.text) for result in results] == [(1.0, "4+5"), (0.0, "4+6")]


def test_a_response_that_cannot_be_decoded_is_not_posted(server: Server) -> None:
    def decode(token_ids: Any) -> str:
        if list(token_ids) == [9]:
            raise OverflowError("no such token")
        return "1"

    samples = [Sample(Prompt("p", (1,), "", "1"), Response([token], [], "stop", 0)) for token in (9, 1, 9)]
    with open_grader(settings(server.url), decode=decode) as grader:
        results = grader.score(samples)
    failed = RewardResult(0.0, detail="the response cannot be decoded: OverflowError: no such token", outcome="error")
    assert results == [failed, RewardResult(1.0, "1", text="1"), failed]
    assert [len(request["samples"]) for request in server.requests] == [1]
