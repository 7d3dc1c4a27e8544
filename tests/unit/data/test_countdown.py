"""Tests of the Countdown task: its problems, and the folder that it is written to."""

import hashlib
import json
import shutil
from collections import Counter
from itertools import permutations
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.countdown import problems, traces, write_calculator_task, write_task
from megatron_rl.data.countdown.problems import Problem
from megatron_rl.errors import UserError

TRACES = (600, 300)
Key = tuple[tuple[int, ...], int]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "task"
    write_task(folder, warm_start_traces=TRACES)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(label: str) -> Key:
    numbers, target = label.split(" > ")
    return tuple(sorted(map(int, numbers.split()))), int(target)


def key_of(problem: Problem) -> Key:
    return problem.numbers, problem.target


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_task_with_a_calculator_has_calls_in_a_tenth_of_its_attempts(tmp_path: Path, task: Path) -> None:
    folder = tmp_path / "calculator"
    write_calculator_task(folder, warm_start_traces=2000)
    for name in ("train.jsonl", "held_out.jsonl", "fresh.jsonl"):
        assert (folder / name).read_bytes() == (task / name).read_bytes()
    responses = pq.read_table(folder / "warm_start.parquet")["response"].to_pylist()
    calls = [response for response in responses if "calc" in response]
    assert 0.07 < len(calls) / len(responses) < 0.13
    before = snapshot(folder)
    write_calculator_task(folder, warm_start_traces=2000)
    assert snapshot(folder) == before
    with pytest.raises(UserError, match="holds another Countdown task"):
        write_task(folder, warm_start_traces=TRACES)


def test_there_are_1791_problems() -> None:
    every = problems.all_problems()
    assert len({key_of(problem) for problem in every}) == len(every) == 1791
    assert all(0 < problem.share <= 1 and 1 <= problem.target <= 80 for problem in every)


@given(st.tuples(*[st.integers(1, 9)] * 3))
def test_attempts_are_exactly_the_correct_ones(numbers: tuple[int, ...]) -> None:
    """The reference is Python's own arithmetic over every order and pair of operators."""
    expected: Counter[tuple[str, int]] = Counter()
    for x, y, w in permutations(numbers):
        for first in "+-*":
            for second in "+-*":
                z = eval(f"{x} {first} {y}")
                result = eval(f"({z}) {second} {w}")
                if 0 <= z <= 80 and 0 <= result <= 80:
                    expected[f"{x} {first} {y} = {z} {second} {w} = {result}", result] += 1
    assert Counter((attempt.text, attempt.result) for attempt in problems.attempts(numbers)) == expected


@given(st.integers(0, 2**32))
def test_splits_are_disjoint_and_complete(seed: int) -> None:
    splits = problems.split_problems(seed)
    parts = [{key_of(problem) for problem in part} for part in (splits.train, splits.held_out, splits.fresh)]
    assert [len(part) for part in parts] == [991, 400, 400]
    assert len(set.union(*parts)) == 1791


def test_no_problem_is_in_two_files(task: Path) -> None:
    files = {name: [row["label"] for row in rows(task / f"{name}.jsonl")] for name in ("train", "held_out", "fresh")}
    warm = [
        row.removeprefix("<bos> ").removesuffix(" :")
        for phase in "ab"
        for row in pq.read_table(task / f"warm_start_{phase}.parquet")["prompt"].to_pylist()
    ]
    train, held_out, fresh = ({key(label) for label in files[name]} for name in ("train", "held_out", "fresh"))
    assert train and held_out and fresh
    assert not held_out & fresh
    assert not (train | {key(label) for label in warm}) & (held_out | fresh)
    # An evaluation problem occurs once, and a training problem occurs once in each order of its numbers.
    assert (len(files["held_out"]), len(files["fresh"])) == (len(held_out), len(fresh)) == (101, 121)
    orders = {f"{' '.join(map(str, order))} > {target}" for numbers, target in train for order in permutations(numbers)}
    assert sorted(files["train"]) == sorted(orders)


def test_rl_problems_have_enough_solutions(task: Path) -> None:
    shares = {key_of(problem): problem.share for problem in problems.all_problems()}
    labels = [row["label"] for name in ("train", "held_out", "fresh") for row in rows(task / f"{name}.jsonl")]
    assert min(shares[key(label)] for label in labels) >= 0.12


def test_rows_have_prompt_and_label(task: Path) -> None:
    for row in rows(task / "train.jsonl"):
        assert row.keys() == {"prompt", "label"}
        assert row["prompt"] == f"<bos> {row['label']} :"
        assert len(row["prompt"].split()) == 7


def test_traces_have_correct_verdicts_and_fit_the_token_limit(task: Path) -> None:
    for phase, count in zip("ab", TRACES, strict=True):
        table = pq.read_table(task / f"warm_start_{phase}.parquet")
        assert table.column_names == ["prompt", "response"]
        assert table.num_rows == count
        for row in table.to_pylist():
            *words, end = row["response"].split()
            assert end == "<eos>" and len(words) < 46
            numbers, target = key(row["prompt"].removeprefix("<bos> ").removesuffix(" :"))
            texts = {possible.text for possible in problems.attempts(numbers)}
            if words[-1] in traces.FILLERS:
                words.pop()
            for attempt in " ".join(words).split(" wait "):
                text, verdict = attempt.rsplit(" ", 1)
                assert text in texts
                assert verdict == ("ok" if text.endswith(f" = {target}") else "no")


def test_the_mix_sets_the_rates_of_retries_and_noise() -> None:
    sure = traces.Mix(oracle=1.0, wait_after_no=0.0, wait_after_ok=1.0, noise=0.0)
    never = traces.Mix(oracle=0.0, wait_after_no=0.0, wait_after_ok=0.0, noise=1.0)
    every = problems.all_problems()
    for response in traces.traces(every, 50, sure, seed=0)["response"]:
        assert response.count("ok wait") == 3 and response.endswith("ok <eos>")
        assert len(response.split()) == 44
    for response in traces.traces(every, 50, never, seed=0)["response"]:
        assert "wait" not in response and response.split()[-2] in traces.FILLERS
    responses = traces.traces(every, 20_000, traces.MIX_A, seed=0)["response"]
    after_no = [response.split()[10] == "wait" for response in responses if response.split()[9] == "no"]
    # The rate is three percent, within four standard deviations.
    assert abs(sum(after_no) / len(after_no) - 0.03) < 4 * (0.03 * 0.97 / len(after_no)) ** 0.5


def test_the_content_changes_only_with_the_version(task: Path) -> None:
    """Folders of an older content would stay in use under the same VERSION: raise it and update the checksum here."""
    names = ["train.jsonl", "held_out.jsonl", "fresh.jsonl"]
    text = "".join((task / name).read_text() for name in names)
    for phase in "ab":
        text += json.dumps(pq.read_table(task / f"warm_start_{phase}.parquet").to_pydict())
    assert json.loads((task / "manifest.json").read_text())["version"] == 2
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "64463cea1cf8f9fc296beda4f78ed76fe4e16480913d6d890861c50c99b359b8"
    )


def test_writing_again_changes_nothing(task: Path) -> None:
    before = snapshot(task)
    write_task(task, warm_start_traces=TRACES)
    assert snapshot(task) == before
    assert [path.name for path in task.parent.iterdir()] == ["task"]


def test_the_same_seed_writes_the_same_files(task: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "same", warm_start_traces=TRACES)
    write_task(tmp_path / "other", seed=1, warm_start_traces=TRACES)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (task, tmp_path / "same")]
    assert manifests[0] == manifests[1]
    for name in ("train.jsonl", "fresh.jsonl", "warm_start_a.parquet", "model/model.safetensors"):
        assert (task / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_foreign_folders_are_refused_and_left_alone(task: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    changed = tmp_path / "changed"
    shutil.copytree(task, changed)
    with (changed / "train.jsonl").open("a") as file:
        file.write("{}\n")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(task, incomplete)
    (incomplete / "model" / "model.safetensors").unlink()
    before = snapshot(tmp_path)
    cases = [(foreign, "something else"), (changed, "train.jsonl"), (incomplete, "model.safetensors")]
    for folder, words in cases:
        with pytest.raises(UserError, match=words):
            write_task(folder, warm_start_traces=TRACES)
    with pytest.raises(UserError, match="another Countdown task"):
        write_task(task, seed=5, warm_start_traces=TRACES)
    with pytest.raises(UserError, match="is a file"):
        write_task(foreign / "thesis.txt")
    assert snapshot(tmp_path) == before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(folder: Path, seed: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_rl.data.countdown.task.write_model", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_task(tmp_path / "task", warm_start_traces=(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    write_task(tmp_path / "task", warm_start_traces=(1, 1))
    assert (tmp_path / "task" / "manifest.json").is_file()
