from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.checkpoint import rng
from megatron_rl.checkpoint.manifest import DriverState, Origin, RankPart, ShardFile
from megatron_rl.checkpoint.retention import Retention
from megatron_rl.checkpoint.save import Saver

FILES = {"weights-rank-0-part-0.safetensors": b"weights", "exp_avg-rank-0-part-0.safetensors": b"moments"}


class FakeRanks:
    """Ranks that write two files. `fail`, if set, is raised after both are written."""

    def __init__(self) -> None:
        self.fail: BaseException | None = None
        self.bytes = 100
        self.held: dict[str, bytes] | None = None
        self.contents = dict(FILES)

    def state_bytes(self) -> int:
        return self.bytes

    def write_state(self, folder: Path) -> list[RankPart]:
        return self._write(folder, self.contents)

    def hold_state(self) -> None:
        self.held = dict(self.contents)

    def write_held(self, folder: Path) -> list[RankPart]:
        assert self.held is not None
        return self._write(folder, self.held)

    def _write(self, folder: Path, contents: dict[str, bytes]) -> list[RankPart]:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        if self.fail:
            raise self.fail
        files = {
            name: ShardFile(name.split("-")[0], len(data), hashlib.sha256(data).hexdigest(), (name,))
            for name, data in contents.items()
        }
        return [RankPart(files, rng.capture(), optimizer_steps=7)]


class Saving:
    """A saver of fake ranks and the folder that it saves into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks = FakeRanks()
        self.origin = Origin({"layers": 2}, {"tensor": 1}, "float32", {"torch": "2"})
        self.messages: list[str] = []

    def saver(self, retention: Retention | None = None) -> Saver:
        return Saver(self.folder, self.ranks, self.origin, retention or Retention(last=0), self.messages.append)

    def save(self, step: int, retention: Retention | None = None, **metrics: Any) -> Path:
        with self.saver(retention) as saver:
            saver.save(state(step), metrics, background=False)
        return self.folder / f"step_{step:06d}"


def state(step: int) -> DriverState:
    return DriverState(step=step, weight_version=step + 1, cursor={"epoch": 1, "position": step})


@pytest.fixture
def saving(tmp_path: Path) -> Saving:
    return Saving(tmp_path)
