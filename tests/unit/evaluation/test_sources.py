"""A model behind a server with OpenAI's completions API, and the fingerprints of model folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.sources import CompletionServer, _fingerprint
from megatron_rl.reward.grading import generation_fault
from megatron_rl.types import Prompt, SamplingParams
from tests.unit.evaluation.completion_server import Server


def complete(body: dict[str, Any]) -> tuple[int, Any]:
    text = body["prompt"].upper()
    choice = {"text": text, "finish_reason": "length" if len(text) > 3 else "stop"}
    return 200, {"choices": [choice], "usage": {"completion_tokens": len(text)}}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(complete) as server:
        yield server


def connect(url: str, model: str | None = None) -> CompletionServer:
    return CompletionServer(url, model=model, tokenizer=None, concurrency=4, timeout=600.0)


PROMPTS = [Prompt("s:0", (0,), "abc", None), Prompt("s:1", (0,), "defg", None)]
SAMPLING = SamplingParams(n=2, max_tokens=9, temperature=0.5, stop_token_ids=(), seed=7)


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_every_response_has_its_own_request(server: Server, suffix: str) -> None:
    samples = connect(server.url + suffix).sample(PROMPTS, SAMPLING)
    assert [(s.prompt, s.text, s.response.num_sampled_tokens) for s in samples] == [
        *[(PROMPTS[0], "ABC", 3)] * 2,
        *[(PROMPTS[1], "DEFG", 4)] * 2,
    ]
    assert [s.response.finish_reason for s in samples] == ["stop"] * 2 + ["length"] * 2
    assert {request["path"] for request in server.requests} == {"/v1/completions"}
    assert len({request["seed"] for request in server.requests}) == 4
    assert {(r["model"], r["max_tokens"], r["temperature"], r["top_p"]) for r in server.requests} == {
        ("only", 9, 0.5, 1.0)
    }


def test_an_empty_answer_is_no_failed_generation(server: Server) -> None:
    server.answer = lambda body: complete(body | {"prompt": ""})
    samples = connect(server.url).sample(PROMPTS, SAMPLING)
    assert {sample.text for sample in samples} == {""}
    assert {generation_fault(sample.response) for sample in samples} == {""}


def test_a_server_with_several_models_needs_a_name(server: Server) -> None:
    server.models = ["one", "two"]
    with pytest.raises(UserError, match="serves one, two: choose one with --model-name"):
        connect(server.url)
    assert connect(server.url, "two").identity["model"] == "two"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, "too long"), "status 400: .*too long.*Finished batches are kept"),
        ((200, {"choices": []}), "gives an answer of unknown form"),
    ],
)
def test_a_server_that_fails_stops_the_evaluation(server: Server, answer: tuple[int, Any], words: str) -> None:
    server.answer = lambda body: answer
    with pytest.raises(UserError, match=words):
        connect(server.url).sample(PROMPTS, SAMPLING)


def test_folders_with_different_weights_have_different_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        _fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    first = _fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert _fingerprint(tmp_path) != first
