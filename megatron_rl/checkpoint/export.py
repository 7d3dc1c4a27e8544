"""The trained model as an ordinary Hugging Face folder, and the proof that it is the same model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.checkpoint.hf_shards import HfShard, finish_hf_folder
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import copy_all_but_weights


def export_hf(folder: Path, source: Path, write_shards: Callable[[Path], list[HfShard]]) -> None:
    """Every pipeline stage writes its files, the index is added, and what else `source` holds is copied.

    The folder appears whole or not at all.
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
def largest_logit_difference(folder: Path, rows: SequenceBatch, actor_logits: Array, dtype: str) -> float:
    """Reload the export with plain transformers; the largest difference over the rows' response tokens.

    actor_logits [T, V], as the actor computed them.
    """
    disable_progress_bar()  # transformers' own, of loading: it would write over the view
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    model.eval()
    predictors = np.split(rows.predictors, np.cumsum(rows.sampled_lengths)[:-1])
    reloaded = [
        model(torch.tensor(sequence[None, :-1], dtype=torch.int64)).logits[0, torch.tensor(places)].float().numpy()
        for sequence, places in zip(rows.sequences, predictors, strict=True)
    ]
    return float(np.abs(np.concatenate(reloaded) - actor_logits).max())
