"""Writes the weight files of a Hugging Face folder: safetensors files of bounded size and their index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import INDEX, SINGLE
from megatron_rl.utils.safetensors_files import write_safetensors

MAX_SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class HfShard:
    """A weight file under a temporary name. The final name contains the number of files, which is known at the end."""

    file: str
    tensors: tuple[str, ...]
    bytes: int
    dtypes: frozenset[str]
    """Dtypes of the tensors by torch's names: float32, bfloat16, ..."""


def write_hf_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int = MAX_SHARD_BYTES, part: int = 0
) -> list[HfShard]:
    """Writes files of at most `max_bytes`, or of one larger tensor. At most one file's tensors are in memory at a time.

    part: distinguishes and orders the files of several processes that write into one folder.
    """
    shards: list[HfShard] = []
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            shards.append(_write(folder, held, size, part, len(shards)))
            held, size = {}, 0
        held[name] = tensor.detach().cpu()
        size += tensor.nbytes
    if held:
        shards.append(_write(folder, held, size, part, len(shards)))
    return shards


def _write(folder: Path, tensors: dict[str, Tensor], size: int, part: int, number: int) -> HfShard:
    file = f"part-{part:05d}-{number:05d}.safetensors"
    write_safetensors(folder / file, tensors)
    dtypes = frozenset(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return HfShard(file, tuple(tensors), size, dtypes)


def finish_hf_folder(folder: Path, shards: Iterable[HfShard]) -> None:
    """Gives the files of all processes their final names and writes the index if there are several.

    If all tensors have one dtype, it is recorded in config.json.
    """
    ordered = sorted(shards, key=lambda shard: shard.file)
    names = [f"model-{i + 1:05d}-of-{len(ordered):05d}.safetensors" for i in range(len(ordered))]
    for shard, name in zip(ordered, names, strict=True):
        (folder / shard.file).rename(folder / (name if len(ordered) > 1 else SINGLE))
    if len(ordered) > 1:
        weight_map = {tensor: name for shard, name in zip(ordered, names, strict=True) for tensor in shard.tensors}
        total = sum(shard.bytes for shard in ordered)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    dtypes = frozenset[str]().union(*(shard.dtypes for shard in ordered))
    if len(dtypes) == 1:
        _record_dtype(folder / "config.json", *dtypes)


def _record_dtype(path: Path, dtype: str) -> None:
    """Record the dtype under the key that the file uses: `torch_dtype` before transformers 5, `dtype` since."""
    config = json.loads(path.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    path.write_text(json.dumps(config | {key: dtype}, indent=2) + "\n")


def parse_bytes(text: str) -> int:
    """Returns the bytes that "5GB", "200 MiB" or a plain number stands for. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a size. Write it like 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])
