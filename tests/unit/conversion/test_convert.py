"""`megatron-rl convert`: conversion between all formats, the inputs that it refuses, and the files that it leaves."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from megatron_rl.checkpoint.manifest import FORMAT, DriverState, Manifest, Origin, write_manifest
from megatron_rl.checkpoint.shards import write_shard
from megatron_rl.cli import main
from megatron_rl.conversion import bridge, proof, target
from megatron_rl.conversion.convert import convert
from megatron_rl.conversion.torch_dist import read as torch_dist_read
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import INDEX, SINGLE, open_weights
from megatron_rl.models.hf_shards import parse_bytes
from tests.hf_models import MODEL_TYPES, write_hf_model
from tests.tiers import slow

REPOSITORY = Path(__file__).parents[3]


def quiet() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def model(folder: Path, model_type: str = "qwen3", **changes: Any) -> Path:
    """A model folder with the kinds of files that published models have."""
    write_hf_model(folder, model_type, noise=0.1, vocab_size=53, **changes)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "LICENSE").write_text("free")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(folder)
    return {name: weights[name] for name in weights}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        pytest.param(kind, tied, marks=() if (kind, tied) in (("qwen3", False), ("qwen3_moe", True)) else slow)
        for kind in MODEL_TYPES
        for tied in (False, True)
    ],
)
def test_a_round_trip_gives_the_same_model(tmp_path: Path, model_type: str, tied: bool) -> None:
    source = model(tmp_path / "source", model_type, tie_word_embeddings=tied)
    console, text = quiet()
    convert(source, tmp_path / "megatron", console=console)
    convert(tmp_path / "megatron", tmp_path / "back", console=console)
    assert_same(tensors(tmp_path / "back"), tensors(source))
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    said = text.getvalue()
    assert said.count("all checksums match the source") == 2
    assert said.count("logits: 64 random tokens, largest difference") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "megatron", "back"}


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    convert(source, tmp_path / "out", to="hf", max_shard_bytes=20_000, logits=False, console=quiet()[0])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 20_000
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same(tensors(tmp_path / "out"), tensors(source))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_recorded_in_the_config(tmp_path: Path, key: str) -> None:
    source = model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {key: "float32"}))
    console, text = quiet()
    convert(source, tmp_path / "megatron", dtype=torch.bfloat16, console=console)
    convert(tmp_path / "megatron", tmp_path / "back", console=console)
    assert_same(tensors(tmp_path / "back"), {name: t.bfloat16() for name, t in tensors(source).items()})
    assert json.loads((tmp_path / "back/config.json").read_text())[key] == "bfloat16"
    assert text.getvalue().count("logits: 64 random tokens") == 2


def test_a_stored_head_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    source = model(tmp_path / "source", tie_word_embeddings=True)
    stored = tensors(source)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, source / SINGLE)
    convert(source, tmp_path / "out", to="hf", logits=False, console=quiet()[0])
    assert_same(tensors(tmp_path / "out"), stored)


def test_a_model_too_large_for_memory_is_compared_by_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    console, text = quiet()
    convert(model(tmp_path / "source"), tmp_path / "out", console=console)
    assert "logits: not compared, the model needs 0.0 GiB in fp32 and 0.0 GiB are free" in text.getvalue()
    assert "all checksums" in text.getvalue()


def test_a_changed_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is changed on its way to the disk, so it is read back with another checksum."""
    write = target.write_hf_shards

    def damaging(folder: Path, named: Any, size: int) -> Any:
        return write(folder, ((name, tensor + (name == "model.norm.weight")) for name, tensor in named), size)

    monkeypatch.setattr(target, "write_hf_shards", damaging)
    with pytest.raises(
        UserError, match=r"1 of 25 tensors differ from what was written, the first is model\.norm\.weight"
    ):
        convert(model(tmp_path / "source"), tmp_path / "out", to="hf", console=quiet()[0])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_wrong_weight_map_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is wrong in both directions, so the checksums agree but the logits differ."""
    split, join = target.split, torch_dist_read.join

    def swapped_split(kind: str, parts: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        return split(kind, parts[::-1] if kind == "gate_up" else parts, *rest)

    def swapped_join(kind: str, *rest: Any) -> tuple[torch.Tensor, ...]:
        return tuple(join(kind, *rest))[:: -1 if kind == "gate_up" else 1]

    monkeypatch.setattr(target, "split", swapped_split)
    monkeypatch.setattr(torch_dist_read, "join", swapped_join)
    with pytest.raises(
        UserError, match="the converted model is not the same model: on random tokens its logits differ by"
    ):
        convert(model(tmp_path / "source"), tmp_path / "out", console=quiet()[0])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def refused(tmp_path: Path, words: str, *arguments: Any, **settings: Any) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        convert(*arguments, **settings, console=quiet()[0])
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    refused(tmp_path, r"out exists already\. Remove it", source, tmp_path / "out")


def test_a_missing_or_unknown_source_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "nowhere does not exist", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty cannot be converted", tmp_path / "empty", tmp_path / "out")


def test_missing_and_truncated_shards_are_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    convert(source, tmp_path / "sharded", to="hf", max_shard_bytes=20_000, logits=False, console=quiet()[0])
    files = json.loads((tmp_path / "sharded" / INDEX).read_text())["weight_map"]
    shard = tmp_path / "sharded" / files["lm_head.weight"]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, rf"{shard} is not a readable safetensors file", tmp_path / "sharded", tmp_path / "out")
    shard.unlink()
    refused(tmp_path, rf"names files that are not there: {shard.name}", tmp_path / "sharded", tmp_path / "out")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    stored = tensors(source)
    save_file(stored | {"model.norm.weight": torch.zeros(33)}, source / SINGLE)
    refused(tmp_path, r"model\.norm\.weight: shape \(33,\), expected \(32,\)", source, tmp_path / "out")
    save_file(stored | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, source / SINGLE)
    refused(tmp_path, r"model\.norm\.weight is stored as I8.*quantised", source, tmp_path / "out")
    del stored["lm_head.weight"]
    save_file(stored, source / SINGLE)
    refused(tmp_path, r"missing: lm_head\.weight", source, tmp_path / "out")


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 2**20))
    refused(tmp_path, r"not enough disk space in .*: 0\.06 GiB needed, 0\.01 GiB free", source, tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any) -> None:
    source = model(tmp_path / "source")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "tensor_checksum", full)  # called for each tensor that is written
    refused(
        tmp_path, r"cannot write .*out: No space left on device\. Nothing half-written", source, tmp_path / "out", to=to
    )


def test_a_foreign_megatron_checkpoint_needs_its_model_named(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    convert(source, tmp_path / "megatron", logits=False, console=quiet()[0])
    shutil.rmtree(tmp_path / "megatron/hf")
    refused(tmp_path, r"does not say which model it is.*--model FOLDER", tmp_path / "megatron", tmp_path / "out")
    convert(tmp_path / "megatron/release", tmp_path / "out", model=source, console=quiet()[0])
    assert_same(tensors(tmp_path / "out"), tensors(source))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run's folder of a bf16 model with two checkpoints, and the fp32 weights of the newer one."""
    source = model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    run, weights = tmp_path / "run", {name: tensor + 1e-5 for name, tensor in tensors(source).items()}
    for step, shift in ((2, 1.0), (10, 0.0)):
        folder = run / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        moment = "exp_avg-0.safetensors"
        files = {moment: write_shard(folder / moment, "exp_avg", {"w": torch.ones(1)})}
        for part in range(2):
            mine = {name: weights[name] + shift for name in list(weights)[part::2]}
            files[f"weights-{part}.safetensors"] = write_shard(folder / f"weights-{part}.safetensors", "weights", mine)
        state, origin = DriverState(step, step, {}), Origin({}, {}, "bfloat16", {})
        write_manifest(folder, Manifest(FORMAT, state, {}, origin, optimizer_steps=step, files=files))
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"path": str(source)}}))
    return run, weights


def test_a_run_is_published_in_the_dtype_of_its_model(
    tmp_path: Path, trained: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    run, weights = trained
    console, text = quiet()
    convert(run, tmp_path / "newest", console=console)
    assert_same(tensors(tmp_path / "newest"), {name: tensor.bfloat16() for name, tensor in weights.items()})
    assert json.loads((tmp_path / "newest/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "newest/tokenizer.json").is_file()
    convert(run / "checkpoints/step_000002", tmp_path / "older", dtype=torch.float32, console=console)
    assert_same(tensors(tmp_path / "older"), {name: tensor + 1 for name, tensor in weights.items()})
    assert json.loads((tmp_path / "older/config.json").read_text())["dtype"] == "float32"
    convert(run, tmp_path / "megatron", to="torch_dist", console=console)
    convert(tmp_path / "megatron", tmp_path / "back", console=console)
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "newest"))
    assert text.getvalue().count("logits: 64 random tokens") == 4


def test_a_damaged_checkpoint_is_named_in_the_error(
    tmp_path: Path, trained: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    run, _ = trained
    newest = run / "checkpoints/step_000010"
    (newest / "exp_avg-0.safetensors").unlink()  # Adam's moments are not needed
    (newest / "weights-1.safetensors").write_bytes(b"1" * (newest / "weights-1.safetensors").stat().st_size)
    refused(tmp_path, r"weights-1\.safetensors is damaged \(wrong SHA-256\)", run, tmp_path / "out")


def test_the_error_for_a_run_without_its_model_asks_for_it(
    tmp_path: Path, trained: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    run, weights = trained
    (tmp_path / "source").rename(tmp_path / "moved")
    refused(tmp_path, r"was trained from .*source, which does not exist.*--model FOLDER", run, tmp_path / "out")
    (run / "config.yaml").unlink()
    refused(tmp_path, r"is no longer in its run's folder\. Name the run's model with --model", run, tmp_path / "out")
    convert(run, tmp_path / "out", model=tmp_path / "moved", logits=False, console=quiet()[0])
    assert tensors(tmp_path / "out").keys() == weights.keys()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), ("1.5mb", 1_500_000), ("77", 77)])
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "five", "5TB", "-1GB"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        parse_bytes(text)


def tool(name: str) -> str:
    return str(REPOSITORY / "tools" / name)


def test_the_command_and_the_tools_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tool in a process of its own, as users start both; the other in this one, which spares the imports."""
    source, megatron, back = model(tmp_path / "source"), str(tmp_path / "megatron"), str(tmp_path / "back")
    command = [sys.executable, tool("convert_hf_to_megatron.py"), source, megatron, "--no-logits"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all checksums match the source" in done.stdout
    script = tool("convert_megatron_to_hf.py")
    monkeypatch.setattr(sys, "argv", [script, megatron, back, "--max-shard-size", "20KB", "--no-logits"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    assert "all checksums match the source" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "back"), tensors(source))
    assert main(["convert", str(source), back]) == 2
    assert "back exists already" in capsys.readouterr().err


def gemma(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}))
    return folder


def test_the_error_for_other_families_names_the_needed_package(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"GemmaForCausalLM is not one of the families.*megatron-bridge, which is not installed: run `pip install",
        gemma(tmp_path / "gemma"),
        tmp_path / "out",
    )


class Bridge:
    """Stands in for the AutoBridge of megatron-bridge and records its calls."""

    @classmethod
    def import_ckpt(cls, hf_model_id: str, megatron_path: str) -> None:
        (Path(megatron_path) / "imported").write_text(hf_model_id)

    @classmethod
    def from_hf_pretrained(cls, path: str) -> Bridge:
        made = cls()
        made.path = path  # type: ignore[attr-defined]
        return made

    def export_ckpt(self, megatron_path: str, hf_path: str) -> None:
        if "unknown" in megatron_path:
            raise ValueError("no such architecture")
        (Path(hf_path) / "exported").write_text(f"{megatron_path} {self.path}")  # type: ignore[attr-defined]


def test_other_families_go_through_megatron_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_auto_bridge", lambda family: Bridge)
    source, (console, text) = gemma(tmp_path / "gemma"), quiet()
    convert(source, tmp_path / "megatron", console=console)
    assert (tmp_path / "megatron/imported").read_text() == str(source)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("0")
    convert(tmp_path / "megatron", tmp_path / "back", model=source, console=console)
    assert (tmp_path / "back/exported").read_text() == f"{tmp_path / 'megatron'} {source}"
    assert text.getvalue().count("converted by megatron-bridge, not verified here") == 2
    (tmp_path / "megatron").rename(tmp_path / "unknown")
    refused(
        tmp_path, "megatron-bridge cannot convert .*no such arch", tmp_path / "unknown", tmp_path / "x", model=source
    )
