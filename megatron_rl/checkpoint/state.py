"""A stage's training state as safetensors files with Hugging Face names, so that any layout can load it.

Each file holds one kind of tensor for one pipeline stage: `weights`, Adam's `exp_avg` and `exp_avg_sq`, and the
`lagged` snapshot where there is one. All kinds have the shapes of the weights, so one weight map serves them all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from megatron_rl.actor.optimizer import Optimizer
from megatron_rl.actor.optimizer_state import KINDS, read_state, write_state
from megatron_rl.checkpoint.weight_map import export_hf_weights, import_values
from megatron_rl.errors import UserError

HfConfig = Mapping[str, Any]
STEPS = "adam_steps"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write through Python, so that a full disk is an OSError with a name. Returns the file's SHA-256."""
    data = save(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={"format": "pt", **(metadata or {})}
    )
    with path.open("wb") as file:
        file.write(data)
        file.flush()
    return hashlib.sha256(data).hexdigest()


def save_stage(
    folder: Path,
    model: nn.Module,
    hf_config: HfConfig,
    optimizer: Optimizer,
    snapshot: dict[str, Tensor],
    stage: int,
    publishes: bool,
) -> dict[str, str] | None:
    """Collective over tensor- and data-parallel ranks; the publishing rank writes. Returns file name -> SHA-256."""
    state, steps = read_state(optimizer, model)
    kinds = dict(state)
    if snapshot:
        kinds["lagged"] = snapshot
    hashes: dict[str, str] = {}
    for kind, values in kinds.items():
        tensors = dict(_kept(export_hf_weights(model, hf_config, values), publishes))
        if publishes:
            name = f"{kind}-stage-{stage}.safetensors"
            hashes[name] = write_tensors(folder / name, tensors, {STEPS: str(steps)})
    return hashes if publishes else None


def _kept(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in tensors:  # the gathers are collective: every rank must draw them all
        if keep:
            yield name, tensor


def load_stage(folder: Path, model: nn.Module, hf_config: HfConfig, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and moments into model and optimizer, exactly; returns the lagged snapshot, empty if none was saved."""
    shards = {kind: _Shards(folder, kind) for kind in (*KINDS, "lagged")}
    state = {kind: import_values(model, hf_config, shards[kind]) for kind in KINDS}
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(state["weights"][name])
    write_state(optimizer, model, state, int(shards["weights"].metadata[STEPS]))
    return import_values(model, hf_config, shards["lagged"]) if shards["lagged"] else {}


def export_stage(
    folder: Path, model: nn.Module, hf_config: HfConfig, stage: int, stages: int, publishes: bool
) -> dict[str, Any] | None:
    """This stage's shard of a Hugging Face folder: its file name, tensor names and bytes."""
    tensors = dict(_kept(export_hf_weights(model, hf_config), publishes))
    if not publishes:
        return None
    name = "model.safetensors" if stages == 1 else f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    write_tensors(folder / name, tensors)
    return {"file": name, "tensors": list(tensors), "bytes": sum(t.nbytes for t in tensors.values())}


class _Shards(Mapping[str, Tensor]):
    """Tensor name -> tensor, read when asked for, over the files of one kind."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.metadata: dict[str, str] = {}
        self.files: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{kind}-stage-*.safetensors"), key=_stage_number):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged ({error}): choose an older checkpoint with resume=PATH") from error
            self.metadata.update(file.metadata() or {})
            self.files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _stage_number(path: Path) -> int:
    match = re.search(r"-stage-(\d+)", path.name)
    return int(match.group(1)) if match else 0
