"""Hostile files: each is a plain error within a bound of time and memory, and nothing outside is read or written."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.checkpoint.manifest import MANIFEST, checkpoints, read_manifest, read_rng
from megatron_rl.checkpoint.retention import Retention, prune
from megatron_rl.config.files import read_layers
from megatron_rl.config.overrides import parse_override
from megatron_rl.config.schema import DataSettings
from megatron_rl.config.yaml_text import leaves, parse_yaml
from megatron_rl.data import prompts as prompts_module
from megatron_rl.data.prompts import load_prompts
from megatron_rl.data.rows import read_rows
from megatron_rl.data.tokenizer import load_tokenizer, stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import check_links, copy_all_but_weights, open_weights, read_config
from megatron_rl.models.weights_check import check_weights
from megatron_rl.observability.diagnosis import read_findings
from megatron_rl.observability.metrics import read_metrics
from megatron_rl.observability.provenance import in_words, read_provenance
from megatron_rl.observability.report.run_data import read_run
from megatron_rl.observability.state import read_state
from megatron_rl.utils import bounded, parquet
from megatron_rl.utils.bounded import OverBudget, budget, read_json, read_parquet
from tests.hf_models import config_json, write_hf_model

DEEP = "[" * 100_000
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
Reader = Callable[[Path], object]


@pytest.fixture(autouse=True)
def in_bounds() -> Iterator[None]:
    """Every test of this file ends within a minute of processor time, and a gibibyte more than the process had."""
    with budget("the test", seconds=60.0, mebibytes=2048):
        yield


def refused(action: Callable[[], object], words: str = "") -> str:
    with pytest.raises(UserError, match=words) as caught:
        action()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


READERS: dict[str, Reader] = {
    "config.yaml": read_layers,
    "run/config.yaml": lambda path: read_run(path.parent),
    "metrics.jsonl": lambda path: read_metrics(path.parent),
    "warnings.jsonl": lambda path: read_findings(path.parent),
    "provenance.jsonl": lambda path: in_words(read_provenance(path.parent)),
    "manifest.json": lambda path: read_manifest(path.parent),
    "rng.json": lambda path: read_rng(path.parent),
    "config.json": lambda path: read_config(path.parent),
    "model.safetensors.index.json": lambda path: open_weights(path.parent),
    "generation_config.json": lambda path: stop_token_ids(None, path.parent, None),
    "rows.jsonl": lambda path: list(read_rows(path)),
    "rows.parquet": lambda path: list(read_rows(path)),
    "dump.parquet": read_parquet,
}
"""Name of a file -> its reader."""


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    if name in ("generation_config.json", "model.safetensors.index.json"):
        return  # their absence, which this counts as, has a test of its own
    refused(lambda: READERS[name](path), path.parent.name)


@pytest.mark.parametrize("name", [name for name in READERS if ".json" in name])
@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, "1" * 5000, '{"step": 1, "time": ' + "1" * 5000 + "}", "\0", '"', "[1]", "{}"]
)
def test_json_of_any_kind_is_an_error_that_names_the_file(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(f"{text}\n{text}\n" if name.endswith("l") else text)
    if name == "config.json" and text == "{}":
        assert read_config(tmp_path) == {}
    elif name == "generation_config.json" and text == "{}":
        with pytest.raises(AttributeError):  # the test gives no tokenizer, to which an empty file leaves the question
            READERS[name](path)
    elif name == "rows.jsonl" and text == "{}":
        assert len(list(read_rows(path))) == 2
    else:
        refused(lambda: READERS[name](path), tmp_path.name)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: " + "[" * 5000, "a: " + "{a: " * 5000, "a: " + "9" * 5000])
def test_yaml_that_multiplies_or_nests_without_end_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    refused(lambda: read_layers(path), "not valid YAML")
    refused(lambda: read_run(tmp_path), "not valid YAML")
    refused(
        lambda: parse_override(text.replace("a: ", "a=", 1)) if "\n" not in text else parse_override("a=" + "[" * 5000)
    )


def test_aliases_within_reason_still_work() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: [*a, *a]\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}]}
    assert len(leaves(text)) == 4


def test_a_configuration_of_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("#" * 2**23)
    refused(lambda: read_layers(path), "larger than 4 MiB")


def test_a_line_of_a_gigabyte_is_refused_after_a_part_of_it(tmp_path: Path) -> None:
    for name, words in (("rows.jsonl", "line 1: longer than 256 MiB"), ("metrics.jsonl", "line 1: longer than 16 MiB")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**30)  # zeros that take no room on the disk
        refused(lambda name=name: READERS[name](tmp_path / name), words)  # type: ignore[misc]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "time": 1e300}',
        '{"step": 1, "time": -1}',
        '{"step": 1, "time": NaN}',
        '{"step": 1, "time": "now"}',
        '{"step": 1' + "0" * 30 + "}",
        '{"step": -5}',
        '{"step": 1.5}',
        '{"step": Infinity}',
        '{"step": "7"}',
        '{"step": null}',
        "[]",
        "7",
    ],
)
def test_a_line_of_metrics_with_impossible_numbers_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2, "time": 3}\n')
    refused(lambda: read_metrics(tmp_path), r"metrics\.jsonl:1: not a line of metrics")


@pytest.mark.parametrize(
    "change", [{"since": 1e300}, {"pid": 10**30}, {"pid": -1}, {"step": -5}, {"total_steps": 10**30}]
)
def test_a_state_with_impossible_numbers_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    state = {"total_steps": 3, "phase": "training", "since": 1.0, "pid": 1, "host": "h", "step": 1}
    (tmp_path / "state.json").write_text(json.dumps(state | change))
    refused(lambda: read_state(tmp_path), next(iter(change)))


def test_a_start_with_an_impossible_time_is_refused(tmp_path: Path) -> None:
    start = {"time": 1e300, "version": "1", "command": "c", "host": "h", "python": "3", "hosts": [], "packages": {}}
    (tmp_path / "provenance.jsonl").write_text(json.dumps(start | {"sha256": None}) + "\n")
    refused(lambda: read_provenance(tmp_path), "line 1: not the start of a run")


def named_in_dictionary(count: int, mebibytes: int) -> Any:
    text = pa.array(["x" * (mebibytes * 2**20)])
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), text)


def in_one_list(values: Any) -> Any:
    roles = pa.array(["user"] * len(values))
    messages = pa.StructArray.from_arrays([roles, values], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array([0, len(messages)], pa.int32()), messages)


PARQUET_BOMBS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "texts of a dictionary": (lambda: named_in_dictionary(4096, 17), {}),
    "texts in the lists of one row": (lambda: in_one_list(named_in_dictionary(4096, 3)), {}),
    "lists of equal numbers": (lambda: pa.array([np.zeros(2**20, np.int8)]), {}),
    "texts that compress": (lambda: pa.array(["x" * 2**24 + str(n) for n in range(3)]), {"use_dictionary": False}),
    "texts that repeat the last one": (
        lambda: pa.array(["x" * 2**20] * 50),
        {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}},
    ),
}


@pytest.mark.parametrize("kind", PARQUET_BOMBS)
def test_a_parquet_bomb_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The bounds count the file's own statements, whatever memory the process holds."""
    if kind not in ("texts of a dictionary", "texts in the lists of one row"):
        monkeypatch.setattr(parquet, "MOST_BYTES", 2**20 - 1)
        monkeypatch.setattr(parquet, "MOST_OF_BATCH", 2**20)
    make, options = PARQUET_BOMBS[kind]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": make()}), path, compression="zstd", **options)
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    refused(lambda: read_parquet(path), r"rows\.parquet: its values take more than")
    refused(lambda: next(read_rows(path)), r"rows\.parquet: its rows stand for far more than the file has")


def test_large_parquet_files_of_real_texts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are measured, because a dictionary of this size could stand for more than the bounds."""
    monkeypatch.setattr(parquet, "MOST_BYTES", 2**24)
    monkeypatch.setattr(parquet, "MOST_OF_BATCH", 2**20)
    texts = [f"{n} " * 100 for n in range(5000)]
    chats = [[{"role": "user", "content": text}] * (n % 3) for n, text in enumerate(texts)]
    rows = {"prompt": chats, "label": texts, "none": [None] * 5000, "map": [{"a": text} for text in texts]}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(rows), path)
    assert [row["label"] for _, row in read_rows(path)] == texts
    assert read_parquet(path, ["prompt"]).column("prompt").to_pylist() == chats
    monkeypatch.setattr(parquet, "MOST_BYTES", 2**21)
    refused(lambda: read_parquet(path), "its values take more than 2 MiB")


def test_a_parquet_file_with_a_broken_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 10}), path)
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 40 + path.read_bytes()[44:])
    refused(lambda: read_parquet(path), "not a readable Parquet file")
    refused(lambda: next(read_rows(path)), "not a readable Parquet file|cannot be read")


def test_a_forged_parquet_file_is_read_or_refused(tmp_path: Path) -> None:
    """pyarrow's own view of some of these footers ends the process."""
    path, numbers = tmp_path / "rows.parquet", random.Random(1)
    chats = [[{"role": "user", "content": f"x{n % 7}"}] for n in range(100)]
    pq.write_table(pa.table({"prompt": chats, "label": ["7"] * 100}), path, compression="zstd")
    whole, refusals = path.read_bytes(), 0
    for _ in range(300):
        forged = bytearray(whole)
        forged[numbers.randrange(len(whole) // 3, len(whole))] = numbers.randrange(256)
        path.write_bytes(forged)
        for reader in (read_parquet, lambda path: list(read_rows(path))):
            try:
                reader(path)
            except UserError as error:
                assert "rows.parquet: " in str(error)
                refusals += 1
    assert refusals > 50


def tokenizer(template: str) -> Any:
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = template
    return made


LOOP = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 11 }}",
        "{{ ('x' * 10 ** 9) ~ ('y' * 10 ** 9) }}",
        LOOP * 3 + "{% endfor %}" * 3,
        LOOP + "{{ 'x' * 10 ** 6 }}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 10 ** (10 ** 8) }}",
        "{{ '%099999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("megatron_rl.data.template.TEMPLATE_SECONDS", 1.0)
    monkeypatch.setattr("megatron_rl.data.template.TEMPLATE_MEBIBYTES", 256)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "label": "1"}) + "\n")
    settings = DataSettings(train=path, template="chat")
    refused(lambda: load_prompts(path, tokenizer=tokenizer(template), settings=settings), "rows.jsonl, line 1")


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "token_ids_of", None)
    path = tmp_path / "rows.jsonl"
    settings = DataSettings(train=path, template="none")
    path.write_text(json.dumps({"prompt": "a " * (2**23 + 1), "label": "1"}) + "\n")
    refused(lambda: load_prompts(path, tokenizer=tokenizer(""), settings=settings), "at most 16777216 are read")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("hostile") / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.5),
        ("hidden_size", -64),
        ("hidden_size", 0),
        ("hidden_size", 10**4000),
        ("num_attention_heads", 0),
        ("vocab_size", 10**12),
        ("intermediate_size", []),
        ("rope_theta", "x"),
        ("rope_theta", -1.0),
        ("rope_scaling", [1]),
        ("rope_parameters", {"rope_theta": -1}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 1e308}),
        ("rms_norm_eps", float("nan")),
        ("architectures", [3]),
        ("architectures", {"a": 1}),
        ("model_type", ["qwen3"]),
        ("layer_types", [["full_attention"]]),
        ("tie_word_embeddings", "yes"),
    ],
)
def test_a_config_with_impossible_values_is_refused(key: str, value: object) -> None:
    refused(lambda: Architecture.from_hf(config_json("qwen3") | {key: value}), key)


@pytest.mark.parametrize("file", [7, "/etc/passwd", "../secret.safetensors", "a/../../b", "", ".", "..", "a\0b", "a/b"])
def test_a_weight_index_names_files_of_its_folder_only(tmp_path: Path, file: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    refused(lambda: open_weights(tmp_path), "model.safetensors.index.json")


def test_a_link_out_of_a_model_folder_is_never_copied(tmp_path: Path, model: Path) -> None:
    folder, export = tmp_path / "model", tmp_path / "export"
    copy_all_but_weights(model, folder)
    (tmp_path / "secret").write_text("secret")
    for link in ("README.md", "sub/notes.txt"):
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(tmp_path / "secret")
        refused(lambda: copy_all_but_weights(folder, export), "outside the model folder")
        refused(lambda: check_weights(folder), "outside the model folder")
        assert not export.exists()
        (folder / link).unlink()
    (folder / "inside.txt").symlink_to("config.json")
    check_links(folder)


def test_the_links_of_the_hub_s_cache_are_permitted(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    copy_all_but_weights(snapshot, tmp_path / "export")
    assert (tmp_path / "export/config.json").read_text() == "{}"
    (tmp_path / "disk").mkdir()
    blobs.rename(tmp_path / "disk/moved")
    blobs.symlink_to(tmp_path / "disk/moved")
    check_links(snapshot)
    blobs.unlink()
    (tmp_path / "disk/moved").rename(blobs)
    local = tmp_path / "local"  # as huggingface_hub made it before 0.23
    local.mkdir()
    (local / "tokenizer.json").symlink_to(blobs / "123")
    check_links(local)
    (snapshot / "README.md").symlink_to(tmp_path / "models--a--b/refs")
    (tmp_path / "models--a--b/refs").write_text("main")
    refused(lambda: check_links(snapshot), "outside the model folder")


@pytest.mark.parametrize(
    "text",
    ["junk", "{}", "[]", '{"model": 7}', '{"model": {"type": "BPE", "vocab": 3, "merges": "x"}}', DEEP, "\0" * 99],
)
def test_a_junk_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json("qwen3")))
    (tmp_path / "tokenizer.json").write_text(text)
    refused(lambda: load_tokenizer(tmp_path), "the tokenizer cannot be loaded")


MANIFEST_OF = {
    "format": 2,
    "state": {"step": 1, "weight_version": 1, "cursor": {}},
    "metrics": {},
    "origin": {"model": {}, "layout": {}, "dtype": "float32", "versions": {}},
    "optimizer_steps": 1,
    "files": {"a.safetensors": {"kind": "weights", "bytes": 1, "sha256": "0"}},
}


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\nb", ".hidden", "a" * 300])
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    manifest = MANIFEST_OF | {"files": {name: {"kind": "weights", "bytes": 1, "sha256": "0"}}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    refused(lambda: read_manifest(tmp_path), "is damaged")


@pytest.mark.parametrize("step", [10**30, -5, "1e3", None, 1.5])
def test_a_manifest_with_an_impossible_step_is_refused(tmp_path: Path, step: object) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(MANIFEST_OF))
    assert read_manifest(tmp_path).state.step == 1
    state = {"step": step, "weight_version": 1, "cursor": {}}
    (tmp_path / MANIFEST).write_text(json.dumps(MANIFEST_OF | {"state": state}))
    refused(lambda: read_manifest(tmp_path), "is damaged")


def test_pruning_removes_no_link_and_nothing_behind_one(tmp_path: Path) -> None:
    for step in (2, 3, 10**13):
        (tmp_path / f"run/step_{step:06d}").mkdir(parents=True)
        (tmp_path / f"run/step_{step:06d}" / MANIFEST).write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MANIFEST).write_text("{}")
    (tmp_path / "run/step_000001").symlink_to(elsewhere)
    prune(tmp_path / "run", Retention(last=1))
    assert (elsewhere / MANIFEST).exists() and (tmp_path / "run/step_000001").is_symlink()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000001", "step_000003"]


def test_the_limits_of_a_budget_end_with_it() -> None:
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with (
        pytest.raises(OverBudget, match=r"the work takes more than 0\.05 s"),
        budget("the work", seconds=0.05, mebibytes=99),
    ):
        while True:
            pass
    with (
        pytest.raises(OverBudget, match="the work needs more than 64 MiB"),
        budget("the work", seconds=9, mebibytes=64),
    ):
        bytearray(2**28)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


def test_a_large_json_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("1" + " " * 100)
    assert read_json(path, most=101) == 1
    refused(lambda: read_json(path, most=100), "larger than")
    assert bounded.MOST_BYTES == 2**28
