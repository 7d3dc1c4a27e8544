"""Hugging Face model folders: the config, the weights (read lazily) and the other files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megatron_rl.errors import UserError
from megatron_rl.models.own_code import refuse_own_code
from megatron_rl.utils.bounded import read_json_object

if TYPE_CHECKING:
    from torch import Tensor  # a dry run reads configs without torch

HASHING_THREADS = 8
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 2**23
LONGEST_HEADER = 10**8
"""Longest header of a safetensors file, in bytes, as the safetensors library has it."""
_OTHER_FORMATS = ("pytorch_model*.bin", "consolidated*.pth", "*.gguf", "*.h5", "*.msgpack")
_LFS_POINTER = b"version https://git-lfs"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's config.json. Raises UserError if the folder or the file is missing, if it is not a JSON object,
    and if the model needs code of its own."""
    if not folder.is_dir():
        raise UserError(f"The model folder {folder} does not exist. Set model.path to a Hugging Face model folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    refuse_own_code(folder)
    return read_json_object(path)


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and type of a tensor, as its file states them."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the type in safetensors: BF16, F32, ..."""


class FolderWeights(Mapping[str, "Tensor"]):
    """A folder's tensors by name. Each is read on access and is not cached."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        """`files`: tensor name -> name of the safetensors file that holds it."""
        self._folder = folder
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        path = self._folder / self.file_of(name)
        with _open(path) as file:
            _check_holds(path, file, [name])
            return file.get_tensor(name)

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor. Raises KeyError for an unknown one."""
        return self._files[name]

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted(set(self._files.values()))

    def headers(self) -> dict[str, Header]:
        """Returns every tensor's header; opens each file but reads no tensor. Raises UserError if a file is damaged."""
        headers: dict[str, Header] = {}
        for file_name in dict.fromkeys(self._files.values()):
            path, names = self._folder / file_name, [name for name, file in self._files.items() if file == file_name]
            with _open(path, framework="np") as file:  # headers need no torch
                _check_holds(path, file, names)
                parts = ((name, file.get_slice(name)) for name in names)
                headers |= {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts}
        return headers

    def __contains__(self, name: object) -> bool:
        return name in self._files  # that of Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_weights(folder: Path) -> FolderWeights:
    """Opens the weights of a folder, in one file or many. Raises UserError if there are none or a shard is missing."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        files = read_json_object(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{index} has no weight_map of names of files. Copy the model again.")
        if strange := sorted({file for file in files.values() if not file or file != Path(file).name or "\0" in file}):
            raise UserError(f"{index} names a file outside its folder: {strange[0][:200]!r}. Copy the model again.")
        missing = sorted(file for file in set(files.values()) if not (folder / file).is_file())
        if missing:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}. Copy the model again.")
        return FolderWeights(folder, files)
    if single.is_file():
        with _open(single, framework="np") as file:
            return FolderWeights(folder, dict.fromkeys(file.keys(), SINGLE))
    raise UserError(f"{folder} {_no_weights(folder)}")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a file of weights, in whatever format."""
    return any(True for pattern in ("*.safetensors", *_OTHER_FORMATS) for _ in folder.glob(pattern))


def stored_bytes(path: Path, name: str) -> Iterator[bytes]:
    """Yields the bytes of a tensor in a safetensors file, in pieces of a few megabytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise UserError(f"{path} is damaged: its header has {length} bytes")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        for first in range(start, end, PIECE):
            yield file.read(min(PIECE, end - first))


def _no_weights(folder: Path) -> str:
    """Says what a folder has in place of readable weights, and what to do."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if any("adapter" in name for name in found):
        return f"holds an adapter ({found[0]}), not a model. Merge it into its base model and save the result."
    if len(found) > 1:
        return f"has {found[0]} and other parts of a model, but no {INDEX}, which lists them. Copy that file too."
    if found:
        return f"has {found[0]}, but the weights are expected in {SINGLE}. Rename the file."
    others = sorted(path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern))
    if others:
        return (
            f"has weights in {others[0]}, but only safetensors files are read. Convert them once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) with transformers."
        )
    return (
        f"is a model folder without weights: it has neither {SINGLE} nor {INDEX}. "
        "Copy the safetensors files beside config.json."
    )


def weights_sha256(folder: Path) -> str:
    """Returns one digest of a folder's weight files, sorted by name. Raises UserError as `open_weights` does."""
    digest = hashlib.sha256()
    files = open_weights(folder).files
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for content in pool.map(file_sha256, (folder / file for file in files)):
            digest.update(content.encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_all_but_weights(source: Path, folder: Path) -> None:
    """Copies all files of a model folder (config, tokenizer, ...) except the weights and hidden folders.

    Raises UserError as `check_links` does, before anything is copied.
    """
    check_links(source)
    for file in _all_but_weights(source):
        place = file.relative_to(source)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)


def check_links(folder: Path) -> None:
    """Raises UserError if a file that an export would copy is a link to a file outside the model folder.

    The cache of the Hugging Face Hub keeps contents in `models--<owner>--<name>/blobs`. Links to these are permitted:
    its own snapshots consist of them, and so do folders of `--local-dir` that older releases made.
    """
    inside = folder.resolve()
    blobs = (inside.parents[1] / "blobs").resolve() if inside.parent.name == "snapshots" else inside
    for file in _all_but_weights(folder):
        target = file.resolve()
        of_hub = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
        if not (of_hub or target.is_relative_to(inside) or target.is_relative_to(blobs)):
            raise UserError(
                f"{file} is a link to {target}, outside the model folder, and exports would hold a copy of that file. "
                "Put the file itself into the folder, or remove the link"
            )


def _all_but_weights(folder: Path) -> list[Path]:
    def counts(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parent.parts)
        return file.is_file() and not hidden and not file.name.endswith(_WEIGHT_SUFFIXES)

    return sorted(filter(counts, folder.rglob("*")))


def _check_holds(path: Path, file: Any, names: Iterable[str]) -> None:
    missing = sorted(set(names) - set(file.keys()))
    if missing:
        raise UserError(f"{path} does not hold {missing[0]}, although {INDEX} lists it there. Copy the model again.")


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _open(path: Path, framework: str = "pt") -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise UserError(f"{path} is a pointer of Git LFS, not the file. Fetch the files: git lfs pull") from None
        cut = any(sign in str(error) for sign in ("MetadataIncompleteBuffer", "incomplete metadata"))
        cause = "the file is cut off" if cut else str(error)
        raise UserError(f"{path} is not a readable safetensors file ({cause}). Copy the model again.") from None
