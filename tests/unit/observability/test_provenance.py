"""Provenance of a run: what is recorded, by every start, in the report and beside an export."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl import __version__
from megatron_rl.observability import provenance as provenance_module
from megatron_rl.observability.provenance import Provenance, commit, in_words, read_provenance, write_beside_export
from megatron_rl.observability.report import write_report


@pytest.fixture
def config(tmp_path: Path) -> Any:
    model, folder = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    folder.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    for name in ("train", "suite"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return SimpleNamespace(
        run=SimpleNamespace(folder=folder),
        seed=3,
        data=SimpleNamespace(train=tmp_path / "train.jsonl"),
        evaluation=SimpleNamespace(suites={"a": SimpleNamespace(data=tmp_path / "suite.jsonl")}),
        model=SimpleNamespace(path=model),
    )


def test_a_start_is_recorded_with_checksums_of_data_and_model(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["megatron-rl", "train", "my run.yaml", "seed=3"])
    provenance = Provenance(config)
    assert read_provenance(config.run.folder), "the record exists before the checksums are known"
    provenance.ran_on(["node-1", "node-2"])
    provenance.finish()
    (start,) = read_provenance(config.run.folder)
    assert start["version"] == __version__ and start["seed"] == 3 and start["hosts"] == ["node-1", "node-2"]
    assert start["command"] == "megatron-rl train 'my run.yaml' seed=3"
    assert "torch" in start["packages"] and start["commit"] == commit(Path(provenance_module.__file__))
    digests = {Path(path).name: digest for path, digest in start["sha256"].items()}
    assert set(digests) == {"train.jsonl", "suite.jsonl", "model.safetensors", "config.json"}
    assert digests["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()


def test_a_resume_adds_a_start_and_a_change_of_version_is_noted(config: Any) -> None:
    Provenance(config).finish()
    path = config.run.folder / "provenance.jsonl"
    path.write_text(path.read_text().replace(f'"version": "{__version__}"', '"version": "0.0.1"'))
    Provenance(config).finish()
    starts = read_provenance(config.run.folder)
    assert [start["version"] for start in starts] == ["0.0.1", __version__]
    facts = dict(in_words(starts))
    assert "start 2 of this run" in facts["Started"] and "other versions" in facts["Note"]


def test_the_report_and_the_export_have_it(config: Any) -> None:
    start = Provenance(config).finish()
    text = write_report(config.run.folder).read_text()
    assert 'id="provenance"' in text and hashlib.sha256(b"weights").hexdigest() in text
    export = config.run.folder / "hf"
    export.mkdir()
    write_beside_export(start, export)
    assert json.loads((export / "provenance.json").read_text()) == start
    (config.run.folder / "provenance.jsonl").unlink()
    assert 'id="provenance"' not in write_report(config.run.folder).read_text(), "a run of an earlier version has none"


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    assert commit(file) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert commit(file) is None, "a file that the checkout does not track, as in an environment inside it"
    git("add", "a")
    git("commit", "-m", "m")
    clean = commit(file)
    assert clean is not None and clean.startswith("commit ") and "changes" not in clean
    file.write_text("2")
    assert commit(file) == f"{clean} with changes"
