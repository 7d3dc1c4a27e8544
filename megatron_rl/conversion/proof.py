"""Proof that a conversion gave the same model: all tensors are read back, and the logits of both are compared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_rl.actor import platform
from megatron_rl.actor.model.policy import build_model
from megatron_rl.conversion import torch_dist
from megatron_rl.conversion.source import ByName, Weights
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import entries, parameters
from megatron_rl.models.weight_map import load_hf_weights
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.weight_sync.checksums import tensor_checksum

SEQUENCES, LENGTH = 2, 32
"""Number and length of the random sequences whose logits are compared."""
TOLERANCE = 1e-4
"""Largest allowed difference as a share of the largest logit: both sides compute in fp32, but in different orders."""
HEADROOM = 1.5
"""Memory that a model takes with its activations, as a multiple of its weights in fp32."""


def compare_tensors(
    written: Mapping[str, int], architecture: Architecture, weights: Weights, advance: Callable[[int], None]
) -> int:
    """Reads all tensors back and compares their checksums.

    advance: called with the bytes of each tensor. Returns the number of tensors; raises UserError if some differ.
    """
    wrong = []
    for entry in entries(architecture):
        for name, tensor in zip(entry.hf_names, weights.read(entry), strict=True):
            if tensor_checksum(tensor) != written[name]:
                wrong.append(name)
            advance(tensor.nbytes)
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(written)} tensors differ from what was written, the first is {wrong[0]}. The target "
            "was removed. The disk may be failing."
        )
    return len(written)


def memory_shortage(architecture: Architecture) -> str | None:
    """Returns why the logits cannot be compared if the model is too large for this machine's memory, else None."""
    needed = HEADROOM * 4 * parameters(architecture)
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"the model needs {needed / 2**30:.1f} GiB in fp32 and {available / 2**30:.1f} GiB are free"


def random_tokens(architecture: Architecture) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, architecture.max_positions)
    return torch.randint(0, architecture.vocabulary, (SEQUENCES, length), generator=generator)


@torch.inference_mode()
def transformers_logits(folder: Path, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Logits [sequences, length, vocabulary] in fp32, computed by transformers with the weights rounded to `dtype`."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=False
    )
    logits: Tensor = model.float().eval()(tokens).logits
    del model
    gc.collect()
    return logits


@torch.inference_mode()
def megatron_logits(hf_config: Mapping[str, Any], tokens: Tensor, fill: Callable[[GPTModel], None]) -> Tensor:
    """Logits [sequences, length, vocabulary] in fp32, computed on the CPU by a Megatron model that `fill` loads.

    Raises UserError if Megatron cannot run on the CPU here.
    """
    device = platform.prepare("cpu")
    process_groups.init_process_groups(Layout(), rank=0, store=HashStore(), device=device)
    try:
        model = build_model(hf_config, layout=Layout(), dtype=torch.float32, device=device)
        fill(model)
        logits: Tensor = model.eval()(tokens, None, None)
    finally:
        process_groups.destroy()
    return logits


def fill_from(weights: Weights, hf_config: Mapping[str, Any]) -> Callable[[GPTModel], None]:
    """Returns a function that loads a Megatron model through this project's weight map."""
    tensors = ByName(weights, Architecture.from_hf(hf_config))
    return lambda model: load_hf_weights(model, hf_config, tensors)


def fill_by_megatron(folder: Path) -> Callable[[GPTModel], None]:
    """Returns a function that loads a Megatron model through Megatron's own reader of distributed checkpoints."""

    def fill(model: GPTModel) -> None:
        path = str(torch_dist.resolve(folder))
        common = dist_checkpointing.load_common_state_dict(path)
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        metadata["dp_cp_group"] = process_groups.dp_group()
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, path)
        model.load_state_dict(loaded["model"])

    return fill
