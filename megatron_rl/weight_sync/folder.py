"""Transport through a folder, on a shared file system or in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from megatron_rl.utils.files import owned_folder, write_error
from megatron_rl.utils.safetensors_files import SafetensorsWriter
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.transport import NamedTensors, Pushed

PREFIX = "megatron-rl-weights-"


def shared_folder() -> Path:
    """Returns a new folder in shared memory, or in the temporary folder if shared memory is not writable.

    Folders that killed runs left there are removed, as they occupy memory.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return owned_folder(PREFIX, parent)


class FolderTransport:
    """Implements `WeightTransport`. Only the newest version exists: engines must read it before the next `push`."""

    def __init__(self, folder: Path, stage: int, bucket_bytes: int) -> None:
        self.folder, self.stage, self.bucket_bytes = folder, stage, bucket_bytes

    def connect(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """Write one file per bucket, tensor by tensor. Raises UserError if the folder cannot take them, as when it is
        full.

        A complete file replaces the old one instead of overwriting it, as an engine may still have the old one mapped.
        """
        try:
            files = self._written(taker.watch(tensors) if taker else tensors)
        except OSError as error:
            raise write_error(self.folder, error) from error
        parts, total = tuple(file.path for file in files), sum(file.size for file in files)
        return Pushed(self.stage, total, parts, taker.result() if taker else None)

    def _written(self, tensors: NamedTensors) -> list[SafetensorsWriter]:
        files: list[SafetensorsWriter] = []
        dtype = None
        for name, tensor in tensors:
            if not files or tensor.dtype != dtype or files[-1].size + tensor.nbytes > self.bucket_bytes:
                if files:
                    files[-1].close()
                files.append(SafetensorsWriter(self._path(len(files))))
            files[-1].add(name, tensor.detach())
            dtype = tensor.dtype
        if files:
            files[-1].close()
        return files

    def _path(self, number: int) -> Path:
        return self.folder / f"stage-{self.stage:02}-bucket-{number:03}.safetensors"

    def stop(self) -> None:
        """Does nothing: writing files waits for no engine."""

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
