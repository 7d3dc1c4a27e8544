"""Ids of the Hugging Face Hub, with a cache that is made by hand and a stub in place of the download."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _cache_assets

from megatron_rl.cli import main
from megatron_rl.config import load_config
from megatron_rl.data.hub import is_hub_id, local_data, local_model, with_local_copies
from megatron_rl.data.rows import read_rows
from megatron_rl.doctor.examine import examine
from megatron_rl.errors import UserError
from megatron_rl.run.dry_run import dry_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Cache = Callable[[str, str, dict[str, str]], Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Returns a function that puts a repository into an otherwise empty cache. The Hub is out of reach."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def put(kind: str, name: str, files: dict[str, str]) -> Path:
        repository = folder / f"{kind}s--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        for file, text in files.items():
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).write_text(text)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT)
        return snapshot

    return put


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B@refs", True),
        ("openai/gsm8k:main:test", True),
        ("here/Qwen3-14B-Base", False),  # the folder `here` exists, so this is a misspelt path
        ("here", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("../b", False),
        ("data/train.parquet", False),
        ("data/train.jsonl", False),
    ],
)
def test_what_is_an_id(text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(Path(text)) is expected


def test_a_model_in_the_cache_is_found_without_the_hub(cache: Cache) -> None:
    snapshot = cache("model", "Qwen/Qwen3-0.6B", {"config.json": "{}"})
    assert local_model(Path("Qwen/Qwen3-0.6B"), "model.path") == snapshot
    assert local_model(Path(f"Qwen/Qwen3-0.6B@{COMMIT}"), "model.path") == snapshot
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert local_model(Path("Qwen/Qwen3-0.6B"), "model.path") == Path("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("download", [False, True])
def test_what_is_not_to_be_had_is_an_error_with_the_command(cache: Cache, download: bool) -> None:
    with pytest.raises(UserError, match=r"model\.path: Qwen/Qwen3-9B is neither a path .*`hf download Qwen/Qwen3-9B`"):
        local_model(Path("Qwen/Qwen3-9B"), "model.path", download)
    with pytest.raises(UserError, match=r"data\.train: a/b@v1 .*`hf download a/b --repo-type dataset --revision v1`"):
        local_data(Path("a/b@v1"), "data.train", "train", download)


def test_what_is_not_in_the_cache_is_downloaded(cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def stub(**options: Any) -> str:
        calls.append(options)
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    assert local_model(Path("Qwen/Qwen3-4B@v2"), "model.path") == tmp_path / "downloaded"
    (_, asked) = calls
    assert (asked["repo_id"], asked["revision"], asked["repo_type"]) == ("Qwen/Qwen3-4B", "v2", "model")
    assert "*.safetensors" in asked["allow_patterns"] and not any("bin" in name for name in asked["allow_patterns"])


def test_the_only_split_of_a_data_set_is_taken(cache: Cache) -> None:
    cache("dataset", "me/maths", {"test.jsonl": lines({"prompt": "1+1", "label": "2"}, {"prompt": "2", "label": "2"})})
    file = local_data(Path("me/maths"), "data.train", "train")
    assert file.suffix == ".parquet" and COMMIT[:12] in file.name
    assert rows_of(file) == [{"prompt": "1+1", "label": "2"}, {"prompt": "2", "label": "2"}]
    assert local_data(Path("me/maths"), "data.train", "train") == file


def test_a_split_is_chosen_by_its_use_or_by_its_name(cache: Cache) -> None:
    files = {f"{split}.jsonl": lines({"prompt": split, "label": "1"}) for split in ("train", "test")}
    cache("dataset", "me/both", files)

    def chosen(text: str, split: str) -> str:
        return rows_of(local_data(Path(text), "data.train", split))[0]["prompt"]

    assert [chosen("me/both", "train"), chosen("me/both", "test"), chosen("me/both:test", "train")] == [
        "train", "test", "test",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"me/both:dev has no split dev; name one: me/both:train, me/both:test"):
        local_data(Path("me/both:dev"), "data.train", "train")


def test_a_published_set_is_prepared(cache: Cache) -> None:
    problems = [{"problem": f"What is {n}?", "answer": str(n), "unique_id": f"{n}"} for n in range(500)]
    cache("dataset", "HuggingFaceH4/MATH-500", {"test.jsonl": lines(*problems)})
    file = local_data(Path("HuggingFaceH4/MATH-500"), "evaluation.suites.math500", "test")
    first = rows_of(file)[0]
    assert (first["prompt"], first["label"], len(rows_of(file))) == ("What is 0?", "0", 500)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_configuration_gets_its_local_copies(cache: Cache) -> None:
    snapshot = cache("model", "Qwen/Qwen3-0.6B", {"config.json": "{}"})
    cache("dataset", "me/maths", {"train.jsonl": lines({"prompt": "1+1", "label": "2"})})
    Path("run.yaml").write_text(
        "model: {path: Qwen/Qwen3-0.6B}\ndata: {train: me/maths}\nreward: {name: math}\ntrain: {steps: 1}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 2, max_response_tokens: 8}\n"
        "evaluation: {suites: {held_out: me/maths}}\nprepare: {task: countdown, folder: later}\n"
    )
    config = with_local_copies(load_config("run.yaml"))
    assert config.model.path == snapshot
    assert rows_of(config.data.train) == rows_of(config.evaluation.suites["held_out"].data)
    later = load_config("run.yaml", ["model.path=later/model"])
    assert with_local_copies(later).model.path == Path("later/model")  # the task writes it


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("refused", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub.example")))


def caused(error: Exception) -> Exception:
    """Returns the error with which `snapshot_download` wraps another one."""
    whole = LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub")
    whole.__cause__ = error
    return whole


FAILURES = [
    (httpx2.ConnectError("no route to host"), r"cannot be reached from here \(ConnectError: no route to host\)"),
    (caused(httpx2.ReadTimeout("timed out")), r"the download broke off.*\(ReadTimeout: timed out\).*keeps what is"),
    (RuntimeError("xet: stream ended"), r"the download broke off.*\(RuntimeError: xet: stream ended\)"),
    (OSError(errno.ENOSPC, "No space left on device"), r"the disk of \S+hub is full. Make room, or set HF_HOME"),
    (caused(OSError(errno.ENOSPC, "No space left on device")), r"the disk of \S+hub is full"),
    (
        PermissionError(errno.EACCES, "Permission denied"),
        r"hub cannot be written .*Set HF_HOME to a folder of your own",
    ),
    (http_error(HfHubHTTPError, 401), r"the Hub refuses access \(401\). Log in with `hf auth login`"),
    (http_error(HfHubHTTPError, 404), r"no such model, revision or file \(404\). Correct the id"),
    (http_error(HfHubHTTPError, 429), r"limits the rate of requests \(429\). Wait some minutes"),
    (http_error(HfHubHTTPError, 503), r"has a problem of its own \(503\). Try again later"),
    (http_error(RepositoryNotFoundError, 401), r"the Hub has no such model, or shows it to others only"),
    (http_error(RevisionNotFoundError, 404), r"no such revision. Correct what follows the @"),
    (http_error(GatedRepoError, 403), r"to those who accepted its terms. Accept them on its page"),
    (caused(OfflineModeIsEnabled("offline")), r"HF_HUB_OFFLINE is set.*Unset it"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES, ids=lambda value: type(value).__name__)
def test_every_failure_of_a_download_has_a_cause_and_a_remedy(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def stub(**options: Any) -> str:
        raise LocalEntryNotFoundError("not here") if options.get("local_files_only") else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub)
    with pytest.raises(UserError, match=rf"^model\.path: Qwen/Qwen3-4B is neither a path.*{words}") as caught:
        local_model(Path("Qwen/Qwen3-4B"), "model.path")
    assert "\n" not in str(caught.value) and "Fetch it with `hf download Qwen/Qwen3-4B`" in str(caught.value)


def test_a_full_disk_while_rows_are_written_is_an_error_that_names_the_folder(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache("dataset", "me/maths", {"train.jsonl": lines({"prompt": "1+1", "label": "2"})})

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.to_parquet", full)
    with pytest.raises(UserError, match=r"data\.train: me/maths: the disk of .* is full"):
        local_data(Path("me/maths"), "data.train", "train")


def test_a_published_model_that_a_recipe_expects_in_a_folder_is_fetched_there(cache: Cache) -> None:
    command = r"`hf download Qwen/Qwen3-14B-Base --local-dir models/Qwen3-14B-Base`"
    with pytest.raises(UserError, match=command):
        local_model(Path("models/Qwen3-14B-Base"), "model.path", download=False)


def test_a_configuration_names_everything_that_has_no_local_copy(cache: Cache) -> None:
    Path("run.yaml").write_text(
        "model: {path: Qwen/Qwen3-0.6B}\ndata: {train: me/maths}\nreward: {name: math}\ntrain: {steps: 1}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 2, max_response_tokens: 8}\n"
    )
    config = load_config("run.yaml")
    with pytest.raises(UserError) as caught:
        with_local_copies(config, download=False)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["data.train", "model.path"]
    findings = [finding for finding in examine(config, quick=True) if finding.check == "model and data"]
    assert [finding.state for finding in findings] == ["failure", "failure"]
    assert findings[1].remedy == "fetch it with `hf download Qwen/Qwen3-0.6B`"
    with pytest.raises(UserError) as dry:
        dry_run(config, "run.yaml", caught.value)
    assert str(dry.value).count("model.path: ") == 1 and str(dry.value).count("data.train: ") == 1


def test_convert_takes_an_id_of_the_hub(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "Qwen/Qwen3-0.6B", "out"]) == 2
    err = capsys.readouterr().err
    assert "source: Qwen/Qwen3-0.6B is neither a path" in err and "`hf download Qwen/Qwen3-0.6B`" in err
