"""Tests of the conversion of published sets, with small files in their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.cli import main
from megatron_rl.data.published import SETS, prepare
from megatron_rl.errors import UserError
from megatron_rl.reward.maths import verify_maths
from megatron_rl.types import Prompt, Response, Sample

FILES = Path(__file__).parents[2] / "fixtures" / "published"
CASES = {
    "dapo-math-17k": (["dapo.parquet"], 6, {"duplicate": 10, "contradictory answers": 6}, 5),
    "aime-2024": (["aime_2024.parquet"], 4, {}, 4),
    "aime-2025": (["aime_2025_i.jsonl", "aime_2025_ii.jsonl"], 4, {}, 4),
    "math-500": (["math_500.jsonl"], 3, {}, 3),
    "minerva": (["minerva.jsonl"], 2, {}, 2),
    "olympiadbench": (["olympiadbench.parquet"], 3, {}, 3),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CASES)
def test_each_set_is_converted(tmp_path: Path, name: str) -> None:
    files, problems, dropped, kept = CASES[name]
    report = prepare(name, [FILES / file for file in files], tmp_path / "out.parquet", problems=problems)
    rows = rows_of(tmp_path / "out.parquet")
    assert (report.kept, dict(report.dropped), len(rows)) == (kept, dropped, kept)
    assert set(rows[0]) == {"prompt", "label", "id", "extra"}
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == kept
    assert all("Answer:" not in row["prompt"] and row["prompt"] == row["prompt"].strip() for row in rows)
    about = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"megatron_rl"])
    assert about["kept"] == kept and [len(source["sha256"]) for source in about["sources"]] == [64] * len(files)


@pytest.mark.parametrize("name", CASES)
def test_the_maths_verifier_accepts_every_label(tmp_path: Path, name: str) -> None:
    files, problems, _, _ = CASES[name]
    prepare(name, [FILES / file for file in files], tmp_path / "out.parquet", problems=problems)
    for row in rows_of(tmp_path / "out.parquet"):
        prompt = Prompt("x:0", (1,), row["prompt"], row["label"])
        sample = Sample(prompt, Response([1], [0.0], "stop", 0), rf"\boxed{{{row['label']}}}")
        assert verify_maths(sample).score == 1.0, row


def test_every_set_has_a_case() -> None:
    assert set(CASES) == set(SETS)


def test_two_published_forms_of_a_set_give_the_same_problems(tmp_path: Path) -> None:
    report = prepare("aime-2024", [FILES / "aime_2024_verl.parquet"], tmp_path / "verl.parquet", problems=4)
    prepare("aime-2024", [FILES / "aime_2024.parquet"], tmp_path / "plain.parquet", problems=4)
    assert dict(report.dropped) == {"duplicate": 4}
    verl, plain = rows_of(tmp_path / "verl.parquet"), rows_of(tmp_path / "plain.parquet")
    assert [(row["prompt"], row["label"]) for row in verl] == [(row["prompt"], row["label"]) for row in plain]


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    for out in ("a.parquet", "b.parquet"):
        prepare("dapo-math-17k", [FILES / "dapo.parquet"], tmp_path / out, problems=6)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_length_filter_counts_the_problems_it_drops(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    report = prepare("math-500", [FILES / "math_500.jsonl"], out, problems=3, too_long=lambda text: len(text) > 30)
    assert dict(report.dropped) == {"too long": 2} and report.kept == 1
    with pytest.raises(UserError, match="every problem of MATH-500 was dropped"):
        prepare("math-500", [FILES / "math_500.jsonl"], out, problems=3, too_long=lambda text: True)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "there are no rows"),
        ([{"question": "q", "reply": "a"}], "line 1: the columns are question, reply; MATH-500 has problem and answer"),
        ([{"problem": "q", "answer": "1"}, {"problem": "r"}], "line 2: column answer: missing"),
        (
            [{"problem": "q", "answer": "1"}, {"problem": 5, "answer": "1"}],
            "line 2: column problem: expected text, found a",
        ),
        ([{"problem": "q", "answer": None}], "line 1: column answer: expected text or a number, found nothing"),
        ([{"problem": "q", "answer": {"a": 1}}], "line 1: column answer: expected text or a number, found an object"),
        ([{"problem": "q", "answer": True}], "line 1: column answer: expected text or a number, found a switch"),
        ([{"problem": " ", "answer": "1"}], "line 1: column problem: the problem is empty"),
        ([{"problem": "q", "answer": " "}], "line 1: column answer: the answer is empty"),
        ([{"problem": "q", "answer": [1]}], "line 1: column answer: expected a list of texts"),
        ([{"problem": "\ud800", "answer": "1"}], "line 1: .*surrogates not allowed"),
        ([{"problem": "q", "answer": "1"}], "1 distinct problems; MATH-500 has 500.*--problems 1"),
    ],
)
def test_an_unexpected_form_is_reported_with_column_and_row(
    tmp_path: Path, rows: list[dict[str, Any]], words: str
) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(UserError, match=words):
        prepare("math-500", [jsonl(tmp_path / "drifted.jsonl", rows)], out)
    assert not out.exists()


def test_an_unexpected_form_in_parquet_is_reported_with_column_and_row(tmp_path: Path) -> None:
    table = pa.table({"prompt": [[{"role": "user", "content": "q"}]], "reward_model": ["34"]})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"row 0: column reward_model: expected \{ground_truth: ...\}, found text"):
        prepare("dapo-math-17k", [tmp_path / "x.parquet"], tmp_path / "out.parquet")


def test_a_solution_without_a_box_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"problem": "q", "solution": "so it is 4"}])
    with pytest.raises(UserError, match=r"line 1: column solution: there is no \\boxed"):
        prepare("minerva", [path], tmp_path / "out.parquet")


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    arguments = ("math-500", [FILES / "math_500.jsonl"], tmp_path / "out.parquet")
    with pytest.raises(UserError, match=r"its SHA-256 is 3514\w+, not as given"):
        prepare(*arguments, problems=3, sha256=["0" * 64])
    digest = prepare(*arguments, problems=3).sources[0].sha256
    assert prepare(*arguments, problems=3, sha256=[digest]).kept == 3


def test_a_known_file_is_recognised_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = prepare("math-500", [FILES / "math_500.jsonl"], tmp_path / "a.parquet", problems=3).sources[0].sha256
    monkeypatch.setitem(SETS["math-500"].checksums, digest, "made up")
    report = prepare("math-500", [FILES / "math_500.jsonl"], tmp_path / "a.parquet", problems=3)
    assert report.sources[0].known_as == "made up"


def test_the_command_prepares_a_set_and_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dapo.parquet"
    arguments = ["data", "prepare", "dapo-math-17k", "--source", str(FILES / "dapo.parquet"), "--out", str(out)]
    assert main(arguments) == 2
    assert "6 distinct problems" in capsys.readouterr().err and not out.exists()
    assert main([*arguments, "--problems", "6"]) == 0
    shown = capsys.readouterr().out
    assert "10 (duplicate)" in shown and "6 (contradictory answers)" in shown and "5 problems" in shown
    assert main(["data", "prepare", "math500", "--source", "x", "--out", "y"]) == 2
    assert "known: dapo-math-17k" in capsys.readouterr().err
    assert main([*arguments, "--max-prompt-tokens", "9"]) == 2
    assert "--tokenizer and --max-prompt-tokens go together" in capsys.readouterr().err
    assert main([*arguments[:-1], "out.jsonl", "--problems", "6"]) == 2
    assert "must end in .parquet" in capsys.readouterr().err
