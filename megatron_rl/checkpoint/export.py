"""Export of the trained model as an ordinary Hugging Face folder, and the check that it is the same model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import copy_all_but_weights
from megatron_rl.models.hf_shards import HfShard, finish_hf_folder


def export_hf(folder: Path, source: Path, write_shards: Callable[[Path], list[HfShard]]) -> None:
    """Writes a Hugging Face folder: the weights of all pipeline stages, their index, and all other files of `source`.

    The folder appears complete or not at all. Raises UserError if it cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_all_but_weights(source, partial)
        finish_hf_folder(partial, write_shards(partial))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the model {folder}: {error.strerror}; nothing half-written was left") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.inference_mode()
def largest_logit_difference(folder: Path, batch: SequenceBatch, actor_logits: Array, dtype: str) -> float:
    """Reloads the export with plain transformers and compares its logits with the actor's.

    actor_logits: [T, V], the actor's logits of the T sampled tokens. Returns the largest absolute difference.
    """
    # Its models take seconds to import, which a run should not spend before its first step.
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the loading bar of transformers would overwrite the terminal view
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    model.eval()
    predictors = np.split(batch.predictors, np.cumsum(batch.sampled_lengths)[:-1])
    reloaded = [
        model(torch.tensor(sequence[None, :-1], dtype=torch.int64)).logits[0, torch.tensor(places)].float().numpy()
        for sequence, places in zip(batch.sequences, predictors, strict=True)
    ]
    return float(np.abs(np.concatenate(reloaded) - actor_logits).max())
