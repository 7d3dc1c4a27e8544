"""Weights through a folder: on a file system that engines share, or in memory that they share."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rl.checkpoint.shards import GrowingShard
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.transport import NamedTensors, Pushed


class FolderTransport:
    """Implements `WeightTransport`. Only the newest version exists: call `push` when engines are done with the last."""

    def __init__(self, folder: Path, stage: int, bucket_bytes: int) -> None:
        self.folder, self.stage, self.bucket_bytes = folder, stage, bucket_bytes

    def connect(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """A file a bucket, written tensor by tensor. Each replaces the old one, which an engine may still have mapped,
        when it is whole."""
        files: list[GrowingShard] = []
        kind = None
        for name, tensor in taker.watch(tensors) if taker else tensors:
            if not files or tensor.dtype != kind or files[-1].size + tensor.nbytes > self.bucket_bytes:
                if files:
                    files[-1].close()
                files.append(GrowingShard(self._path(len(files))))
            files[-1].add(name, tensor.detach())
            kind = tensor.dtype
        if files:
            files[-1].close()
        parts, total = tuple(file.path for file in files), sum(file.size for file in files)
        return Pushed(self.stage, total, parts, taker.result() if taker else None)

    def _path(self, number: int) -> Path:
        return self.folder / f"stage-{self.stage:02}-bucket-{number:03}.safetensors"

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
