"""Damage to files of a run that has ended: what a disk, a crash or a hand does to them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rl.checkpoint.manifest import checkpoints


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random) -> None:
    """Overwrites a part with zeros, as a crash does that comes before the data reach the disk."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    path.write_bytes(data[:start] + bytes(len(data) - start))


def fill(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """Puts another file of the folder in its place."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if others:
        path.write_bytes(rng.choice(sorted(others)).read_bytes())


def append(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


ANY: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, zero, fill, empty, remove, swap, append)


def damage_checkpoint(folder: Path, rng: random.Random) -> tuple[str, str, str] | None:
    """Damages one file of the newest checkpoint, if there is an older one. Returns kind, file and checkpoint."""
    found = checkpoints(folder / "checkpoints")
    if len(found) < 2:
        return None
    path = rng.choice(sorted(path for path in found[-1].iterdir() if path.stat().st_size))
    before = path.read_bytes()
    how = rng.choice(ANY)
    how(path, rng)
    if path.exists() and path.read_bytes() == before:
        return None
    return how.__name__, f"checkpoint: {path.name}", found[-1].name


def tear_metrics(folder: Path, rng: random.Random) -> tuple[str, str] | None:
    """Cuts the last line of the metrics, as a crash does while it is written."""
    path = folder / "metrics.jsonl"
    if not path.is_file() or not path.stat().st_size:
        return None
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(data[: rng.randrange(last, len(data))])
    return "tear", "metrics.jsonl"


def damage_log(folder: Path, rng: random.Random) -> tuple[str, str] | None:
    return damage_other(folder, rng, dumps=False)


def damage_other(folder: Path, rng: random.Random, *, dumps: bool = True) -> tuple[str, str] | None:
    """Damages a file on which nothing may depend when the run goes on."""
    names = ("config.yaml", "state.json", "logs/driver.log", ".lock", "logs/engine-0.log")
    there = [folder / name for name in names if (folder / name).is_file() and (folder / name).stat().st_size]
    there += sorted((folder / "rollouts").glob("*.parquet")) if dumps else []
    if not there:
        return None
    path = rng.choice(there)
    # Without its configuration, the folder holds no run.
    how = rng.choice([how for how in ANY if path.name != "config.yaml" or how is not remove])
    how(path, rng)
    return how.__name__, path.name if path.parent.name != "rollouts" else "rollouts"


def leave_unfinished(folder: Path, rng: random.Random) -> tuple[str, str]:
    """Leaves what a run leaves that is killed while it writes: parts of a checkpoint, partial files."""
    found = checkpoints(folder / "checkpoints")
    if found and rng.random() < 0.5:
        copy = found[-1].with_name(f"{found[-1].name}.{rng.randrange(16**8):08x}.partial")
        shutil.copytree(found[-1], copy)
        return "unfinished", "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".config.yaml.{rng.randrange(10**5)}.partial").write_bytes(rng.randbytes(50))
    return "unfinished", "config.yaml"
