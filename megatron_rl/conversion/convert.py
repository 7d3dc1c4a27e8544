"""Converts a model from one format to another: the work of `megatron-rl convert`.

Between any two formats, weights pass through the table of `models/families.py`, one entry at a time. The target is
written under a temporary name beside its final one, read back and compared, and only then renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from megatron_rl.conversion import bridge, proof
from megatron_rl.conversion.source import Rounded, Source, hf_folder_of, open_source
from megatron_rl.conversion.target import Target
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import SUPPORTED
from megatron_rl.models.families import entries, parameters
from megatron_rl.models.hf_format import read_config
from megatron_rl.models.hf_shards import MAX_SHARD_BYTES

Format = Literal["hf", "torch_dist"]
_SPARE = 64 * 2**20
"""Disk space to leave for indexes and for the files that are not weights."""


def convert(
    source: Path,
    target: Path,
    *,
    to: Format | None = None,
    model: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    logits: bool = True,
    console: Console | None = None,
) -> None:
    """Writes the model in `source` to `target`, which must not exist, and proves that both are the same model.

    to: by default torch_dist for a Hugging Face folder and hf for anything else. model: the Hugging Face folder that
    describes `source`, needed if no config.json is found beside it. dtype: by default that of the source, and for a
    run's checkpoint that of the model's config.json. logits: compare logits too. Raises UserError and leaves no target.
    """
    console = console or Console()
    to = to or ("torch_dist" if (source / "config.json").is_file() else "hf")
    if target.exists():
        raise UserError(f"{target} exists already. Remove it, or choose another name.")
    hf_folder = hf_folder_of(source, model)
    family = _family(hf_folder)
    with _temporary(target) as partial:
        if family not in SUPPORTED.values():
            bridge.convert(source, hf_folder, partial, to_hf=to == "hf", family=family)
            console.print(f"converted by megatron-bridge, not verified here: {target}", soft_wrap=True)
            return
        opened = open_source(source, hf_folder)
        console.print(f"source: {opened.what} {source}, {_describe(opened)}", highlight=False, soft_wrap=True)
        dtype = dtype or opened.dtype
        _convert(opened, partial, to, dtype, max_shard_bytes, console)
        if logits:
            console.print(_compare_logits(opened, partial, to, dtype), highlight=False, soft_wrap=True)
    console.print(f"target: {target}", highlight=False, soft_wrap=True)


def _convert(
    source: Source, partial: Path, to: Format, dtype: torch.dtype | None, max_shard_bytes: int, console: Console
) -> None:
    with _progress(console) as bar:
        target = Target(source, dtype, lambda size: bar("writing", size))
        total = target.bytes
        free = shutil.disk_usage(partial).free
        if free < total + _SPARE:
            raise UserError(
                f"not enough disk space in {partial.parent}: {(total + _SPARE) / 2**30:.2f} GiB needed, "
                f"{free / 2**30:.2f} GiB free. Nothing was written."
            )
        bar("writing", 0, total)
        if to == "hf":
            target.as_hf(partial, max_shard_bytes)
        else:
            target.as_torch_dist(partial, max_shard_bytes)
        bar("reading back", 0, total)
        back = open_source(partial, hf_folder_of(partial, None))
        count = proof.compare_tensors(
            target.checksums, source.architecture, back.weights, lambda size: bar("reading back", size)
        )
    console.print(f"read back: {count} tensors, all checksums match the source", highlight=False, soft_wrap=True)


def _compare_logits(source: Source, partial: Path, to: Format, dtype: torch.dtype | None) -> str:
    """Returns a line with the largest difference of the logits; raises UserError if it exceeds rounding."""
    if shortage := proof.memory_shortage(source.architecture):
        return f"logits: not compared, {shortage}"
    tokens = proof.random_tokens(source.architecture)
    try:
        expected = _source_logits(source, tokens, dtype)
        if to == "hf":
            found = proof.transformers_logits(partial, tokens, None)
        else:
            found = proof.megatron_logits(source.hf_config, tokens, proof.fill_by_megatron(partial))
    except UserError as error:
        return f"logits: not compared, {error}"
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= proof.TOLERANCE * max(1.0, largest):  # a nan counts as a difference
        raise UserError(
            f"the converted model is not the same model: on random tokens its logits differ by {difference:.1e} "
            f"(largest logit {largest:.1f}). The target was removed."
        )
    return f"logits: {tokens.numel()} random tokens, largest difference {difference:.1e} (largest logit {largest:.1f})"


def _source_logits(source: Source, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    if source.hf_folder == source.folder:
        return proof.transformers_logits(source.folder, tokens, dtype)
    weights = source.weights if dtype is None else Rounded(source.weights, dtype)
    return proof.megatron_logits(source.hf_config, tokens, proof.fill_from(weights, source.hf_config))


def _family(hf_folder: Path) -> str:
    hf_config = read_config(hf_folder)
    names = hf_config.get("architectures") or [SUPPORTED.get(hf_config.get("model_type", ""), "")]
    return str(names[0] or hf_config.get("model_type") or "an unnamed architecture")


def _describe(source: Source) -> str:
    size = parameters(source.architecture)
    dtypes = {str(source.weights.dtype(entry)).removeprefix("torch.") for entry in entries(source.architecture)}
    number = f"{size / 1e9:.2f}B" if size >= 1e7 else f"{size / 1e6:.2f}M"
    return f"{source.architecture.family}, {number} parameters, {' and '.join(sorted(dtypes))}"


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yields a temporary folder beside the target: renamed to it on success, and removed on failure."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}. Nothing half-written was left.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, size: int, total: int | None = None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.advance(tasks[what], size)

        yield advance
