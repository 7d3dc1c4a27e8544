"""Ids of the Hugging Face Hub, with a cache that is made by hand and a stub in place of the download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import _cache_assets

from megatron_rl.config import load_config
from megatron_rl.data.hub import is_hub_id, local_data, local_model, with_local_copies
from megatron_rl.data.rows import read_rows
from megatron_rl.errors import UserError

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
