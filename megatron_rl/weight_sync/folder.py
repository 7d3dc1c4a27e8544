"""Weights through a folder: on a file system that engines share, or in memory that they share."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from megatron_rl.weight_sync.buckets import bucketed
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.transport import NamedTensors, Pushed


class FolderTransport:
    """Implements `WeightTransport`. Only the newest version exists: call `push` when engines are done with the last."""

    def __init__(self, folder: Path, stage: int, bucket_bytes: int) -> None:
        self.folder, self.stage, self.bucket_bytes = folder, stage, bucket_bytes

    def connect(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """A file a bucket. Each replaces the old one, which an engine may still have mapped, when it is whole."""
        parts, total = [], 0
        for number, bucket in enumerate(bucketed(tensors, self.bucket_bytes)):
            path = self.folder / f"stage-{self.stage:02}-bucket-{number:03}.safetensors"
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
            if taker:
                for name, tensor in bucket:
                    taker.add(name, tensor)
            fresh = path.with_suffix(".new")
            save_file(held, fresh)
            fresh.replace(path)
            parts.append(path)
            total += sum(tensor.nbytes for tensor in held.values())
        return Pushed(self.stage, total, tuple(parts), taker.result() if taker else None)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
