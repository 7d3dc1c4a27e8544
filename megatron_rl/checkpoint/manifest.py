"""The manifest of a checkpoint: what the checkpoint holds, how to find checkpoints and how to verify one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import HASHING_THREADS, file_sha256
from megatron_rl.utils.bounded import parse_json_object, read_text
from megatron_rl.utils.sealed import is_intact, sealed

MANIFEST = "manifest.json"
RNG = "rng.json"
PARTIAL = ".partial"
"""Suffix of files and folders that are not finished."""
FORMAT = 2
_ANOTHER = "choose another checkpoint with resume=PATH"
Watch = Callable[[Sequence[str]], Iterable[str]]
LARGEST_STEP = 10**9
StepNumber = Annotated[int, Field(ge=0, le=LARGEST_STEP)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=255)]
"""A name without folders, so that a manifest names files of its own folder only."""
RandomState = dict[str, Any]
"""State of all random number generators of a process, as `checkpoint/rng.py` writes it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a run has written to a file that only grows."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True, slots=True)
class DriverState:
    """State of the driver that a resumed run needs."""

    step: StepNumber
    weight_version: StepNumber
    cursor: dict[str, Any]
    entropy_coefficient: float | None = None
    """Weight of the entropy bonus in the next update, if the loss adapts it."""
    metrics_log: Written | None = None
    """The lines of metrics.jsonl before this step's; None in a checkpoint of an earlier version."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that training reads in addition to its checkpoint."""

    path: str
    sha256: str
    """SHA-256 of the weights, from `hf_format.weights_sha256`."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """The file of training prompts, to which the position in the data and the rollout buffer refer."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The process that wrote the checkpoint."""

    model: dict[str, Any]
    """Fields of the model's `models.architecture.Architecture`."""
    layout: dict[str, int | bool]
    """Fields of the `parallel.layout.Layout` that wrote the checkpoint."""
    dtype: str
    versions: dict[str, str]
    """Package name -> version."""
    reference: ModelFolder | None = None
    """The frozen reference model of the KL penalty, if there is one."""
    data: DataFile | None = None
    """None in a checkpoint of an earlier version."""

    @property
    def layout_in_words(self) -> str:
        """The layout as text, for example `tensor 2 x data 4`."""
        degrees = [f"{name} {degree}" for name, degree in self.layout.items() if degree > 1]
        switches = [name.replace("_", " ") for name, on in self.layout.items() if on is True]
        return " x ".join([*degrees, *switches]) or "one rank"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Manifest entry of one file of the checkpoint."""

    kind: str
    """Kind of the file's contents: weights, exp_avg, exp_avg_sq, lagged, rng or backlog."""
    bytes: int
    sha256: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankPart:
    """The part of a checkpoint that one rank writes."""

    files: dict[str, ShardFile]
    rng: RandomState
    optimizer_steps: int


@dataclass(frozen=True, slots=True)
class RandomStates:
    """Random states of the driver and of the actor's ranks in rank order; see `checkpoint/rng.py`."""

    driver: RandomState
    ranks: list[RandomState]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Table of contents of a checkpoint. It is written last, so a folder without a manifest is not a checkpoint."""

    format: int
    state: DriverState
    metrics: dict[str, float | None]
    """The step's metrics, as in metrics.jsonl."""
    origin: Origin
    optimizer_steps: int
    files: dict[FileName, ShardFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


_ADAPTER = TypeAdapter(Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with (folder / MANIFEST).open("wb") as file:
        file.write(sealed(_ADAPTER.dump_json(manifest, indent=1)))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError if the manifest is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    try:
        content = _content(path)
        written = content.get("format")
        if written != FORMAT:
            raise UserError(
                f"{folder} was written in checkpoint format {written}; this version of megatron-rl reads format "
                f"{FORMAT}: resume with the version that wrote it, or start a new run from that run's HF export"
            )
        return _ADAPTER.validate_python(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({_short(error)}): {_ANOTHER}") from error


def _content(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError if it is damaged, or not what its seal says."""
    try:
        text = read_text(path)
        found = parse_json_object(text, str(path))
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): {_ANOTHER}") from error
    if not is_intact(text.encode()):
        raise UserError(f"{path} is damaged (wrong SHA-256): {_ANOTHER}")
    return found


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def write_rng(folder: Path, states: RandomStates) -> ShardFile:
    data = json.dumps(asdict(states)).encode()
    with (folder / RNG).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ShardFile("rng", len(data), hashlib.sha256(data).hexdigest())


def read_rng(folder: Path) -> RandomStates:
    try:
        return RandomStates(**_content(folder / RNG))
    except TypeError as error:
        raise UserError(f"{folder / RNG} is damaged ({error}): {_ANOTHER}") from error


def verify(folder: Path, manifest: Manifest, *, hashes: bool = True, watch: Watch = iter) -> None:
    """Checks every file of a checkpoint against its manifest.

    hashes: compare SHA-256 as well as existence and size. watch: iterates over the file names while the files are
    hashed, for a progress bar. Raises UserError naming the first file that is missing or damaged.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing: {_ANOTHER}")
        if path.is_symlink():
            raise UserError(f"checkpoint file {path} is a link; a checkpoint has none: {_ANOTHER}")
        if path.stat().st_size != entry.bytes:
            raise UserError(
                f"checkpoint file {path} is damaged ({path.stat().st_size} bytes instead of {entry.bytes}): {_ANOTHER}"
            )
    if not hashes:
        return
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        actual = pool.map(file_sha256, (folder / name for name in manifest.files))
        for name, digest in zip(watch(list(manifest.files)), actual, strict=True):
            if digest != manifest.files[name].sha256:
                raise UserError(f"checkpoint file {folder / name} is damaged (wrong SHA-256): {_ANOTHER}")


def read_checkpoint(folder: Path, watch: Watch = iter) -> Manifest:
    """Returns the manifest after verifying every file. Raises UserError if the checkpoint is incomplete or damaged."""
    manifest = read_manifest(folder)
    verify(folder, manifest, watch=watch)
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, oldest first. Their files are not verified."""
    named = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=step_of)


_NAME = re.compile(r"step_[0-9]{1,12}")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
