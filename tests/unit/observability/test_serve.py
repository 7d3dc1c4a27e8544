"""The dashboard: its pages over HTTP, on loopback only."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.observability.serve import server
from megatron_rl.observability.state import KeptView
from megatron_rl.observability.view import View


@pytest.fixture
def runs(run_folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for name in ("one", "two & three"):
        shutil.copytree(run_folder, root / name)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.yaml").write_text("run: {name: secret}\n")
    return root


@pytest.fixture
def port(runs: Path) -> Iterator[int]:
    with server(runs, 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_address[1]
        serving.shutdown()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_the_start_page_lists_every_run_with_its_numbers(port: int, runs: Path) -> None:
    status, text = get(port, "/")
    assert status == 200 and "200 of 200" in text and "held_out 0.673" in text and "lp_reg" in text
    assert "/run/two%20%26%20three" in text and "two &amp; three" in text


def test_a_run_and_a_comparison_have_their_reports(port: int) -> None:
    status, text = get(port, "/run/two%20%26%20three")
    assert status == 200 and "const charts" in text and "Before and after" in text
    status, text = get(port, "/compare?run=one&run=two+%26+three")
    assert status == 200 and text.count('<div class="card">') >= 2
    assert get(port, "/compare")[0] == 404


def test_a_page_follows_the_run_and_reloads_itself_while_it_is_in_progress(port: int, runs: Path) -> None:
    assert 'http-equiv="refresh"' not in get(port, "/run/one")[1]
    with KeptView(View(), runs / "one", 300, "one") as view:
        view.open()
        view.phase("rollout")
        row = {"step": 201, "time": 1.8e9, "reward/mean": 0.5}
        with (runs / "one" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = get(port, "/run/one")[1]
        assert 'http-equiv="refresh"' in text and "201 of 200" in text
        assert "rollout" in get(port, "/")[1]
    assert "stopped after step" in get(port, "/")[1]


@pytest.mark.parametrize("path", ["/run/secret", "/run/..%2Fsecret", "/run/../secret", "/secret/config.yaml", "/run/"])
def test_only_runs_of_the_folder_are_served(port: int, path: str) -> None:
    assert get(port, path)[0] == 404


def test_it_listens_on_loopback_and_refuses_other_host_names(port: int, runs: Path) -> None:
    with server(runs, 0) as other:
        assert other.server_address[0] == "127.0.0.1"
    assert get(port, "/", host="attacker.example")[0] == 403
    assert get(port, "/", host="localhost")[0] == 200


def test_a_broken_run_is_an_error_in_words(port: int, runs: Path) -> None:
    (runs / "one" / "config.yaml").write_text("{")
    status, text = get(port, "/run/one")
    assert status == 500 and "not valid YAML" in text


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.yaml", "{", "config.yaml: not valid YAML"),
        ("metrics.jsonl", "[]\n{}\n", "metrics.jsonl:1: not a line of metrics"),
        ("state.json", '{"total_st', "state.json: not the state of a run"),
        ("state.json", "[]", "state.json: not the state of a run"),
        ("state.json", "{}", "state.json: not the state of a run (total_steps: Field required"),
    ],
)
def test_the_line_of_a_broken_run_says_what_is_broken(port: int, runs: Path, file: str, text: str, words: str) -> None:
    (runs / "one" / file).write_text(text)
    status, page = get(port, "/")
    assert status == 200 and f"broken: {runs / 'one'}" in page and words in page
    assert "two &amp; three" in page and "200 of 200" in page
    assert get(port, "/run/two%20%26%20three")[0] == 200
    status, page = get(port, "/run/one")
    assert status == 500 and words in page


def test_folders_without_runs_and_taken_ports_are_errors(
    runs: Path, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="Choose another with --port"):
        server(runs, port)
    (tmp_path / "empty").mkdir()
    assert main(["view", str(tmp_path / "empty"), "--port", "0"]) == 2
    assert "holds no runs" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "nowhere")]) == 2
    for number in ("-1", "99999"):
        assert main(["view", str(runs), "--port", number]) == 2
        assert f"port {number}: there is no such port" in capsys.readouterr().err
