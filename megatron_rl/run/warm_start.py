"""Supervised training before RL, with the same actor. Its result is cached under a hash of all its inputs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from megatron_rl.actor.optimizer.learning_rate import learning_rate
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.checkpoint.export import export_hf
from megatron_rl.config import Config
from megatron_rl.config.actor import OptimizerSettings
from megatron_rl.config.schema import WarmStartPhase, WarmStartSettings
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config
from megatron_rl.observability.view import View
from megatron_rl.run.prompts import positions_of
from megatron_rl.utils.parquet import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_rl.cluster.actors import Actors

VERSION = 1
"""Part of the cache key. Increase it whenever a change makes the same inputs give other weights."""


def warm_start(config: Config, actors: Actors, tokenizer: PreTrainedTokenizerBase, view: View) -> Path:
    """Returns the folder of the warm-started model. Trains each phase that is not in the cache.

    The actor's weights are undefined afterwards. Raises UserError if the traces are unusable or the loss diverges.
    """
    settings = config.warm_start
    if settings is None:
        return config.model.path
    folder = config.model.path
    view.phase("warm start")
    for number, phase in enumerate(settings.phases, start=1):
        source = folder
        folder = settings.cache_folder / f"warm_start-{number}-{_key(config, settings, number)}"
        with _alone(folder, view):
            if folder.is_dir():
                view.message(f"warm start, phase {number}: from the cache, {folder}")
                continue
            start = time.monotonic()
            rows = _read_traces(phase.data, tokenizer)
            _check_rows(rows, phase.data, config)
            actors.load_hf(source)
            optimizer = OptimizerSettings(lr=phase.lr, betas=settings.betas, weight_decay=settings.weight_decay)
            actors.prepare(None, optimizer)
            for step, loss in enumerate(_train(phase, settings, rows, actors), start=1):
                if not math.isfinite(loss):
                    raise UserError(
                        f"warm start: the loss is {loss} at step {step}: try a lower lr in warm_start.phases"
                    )
                view.warm_start(step, phase.steps, loss, (time.monotonic() - start) / step * (phase.steps - step))
            export_hf(folder, config.model.path, actors.export_hf)
            seconds = time.monotonic() - start
            view.message(f"warm start, phase {number}: {phase.steps} steps in {seconds:.0f} s, kept in {folder}")
    return folder


@contextmanager
def _alone(folder: Path, view: View) -> Iterator[None]:
    """Holds the lock of a cached result, so that runs that start at the same time train it once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"warm_start.cache_folder: cannot write to {folder.parent}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            view.message("warm start: another run is training the same one; waiting for its result")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            view.message(f"warm start: {folder.parent} has no locks ({error.strerror}); every run trains its own")
        yield


def _train(phase: WarmStartPhase, settings: WarmStartSettings, rows: SequenceBatch, actors: Actors) -> Iterator[float]:
    """Yields each step's loss. The next batch is prepared and sent while a step is running."""
    waiting = None
    for step in range(1, phase.steps + 1):
        first = (step - 1) * settings.batch_size
        batch = rows.take([i % len(rows) for i in range(first, first + settings.batch_size)])
        lr = learning_rate(
            step,
            peak=phase.lr,
            total_steps=phase.steps,
            warmup_steps=settings.warmup_steps,
            schedule="cosine",
            min_ratio=settings.min_lr_ratio,
        )
        submitted = actors.submit_train(batch, lr=lr, denominator=batch.num_sampled_tokens), batch
        if waiting:
            yield actors.train_result(*waiting).loss
        waiting = submitted
    if waiting:
        yield actors.train_result(*waiting).loss


def _read_traces(path: Path, tokenizer: PreTrainedTokenizerBase) -> SequenceBatch:
    """Reads the text columns `prompt` and `response` of a parquet file. Raises UserError if they are unusable."""
    try:
        check_whole(path, ["prompt", "response"])
        table = pq.read_table(path, columns=["prompt", "response"])
    except Exception as error:
        raise UserError(f"{path}: a parquet file with the columns prompt and response is expected: {error}") from error
    if not len(table):
        raise UserError(f"{path} contains no traces")
    prompts, responses = (
        _tokenized(table[name].to_pylist(), f"{path}: {name}", tokenizer) for name in ("prompt", "response")
    )
    return SequenceBatch.of(
        [prompt + response for prompt, response in zip(prompts, responses, strict=True)],
        [len(prompt) for prompt in prompts],
    )


def _check_rows(rows: SequenceBatch, path: Path, config: Config) -> None:
    """Raises UserError for a token that the model does not have, and for a row that is longer than its positions."""
    vocabulary, positions = Architecture.from_hf(read_config(config.model.path)).vocabulary, positions_of(config)
    beyond = np.flatnonzero(rows.token_ids >= vocabulary)
    if len(beyond):
        row = int(np.searchsorted(rows.starts, beyond[0], side="right")) - 1
        raise UserError(
            f"{path}: row {row} has the token id {rows.token_ids[beyond[0]]}, but the model has {vocabulary} token ids "
            "(vocab_size in its config.json): the tokenizer has tokens that the model lacks"
        )
    if rows.lengths.max() > positions:
        row = int(rows.lengths.argmax())
        raise UserError(
            f"{path}: row {row} has {rows.lengths[row]} tokens, prompt and response together, but the model is made "
            f"for {positions} positions. Shorten the row, or set model.max_positions to go beyond them"
        )


def _tokenized(texts: list[Any], what: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UserError(f"{what} of row {row} is {text!r}; text is expected")
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if [] in ids:
        raise UserError(f"{what} of row {ids.index([])} gives no tokens with the model's tokenizer")
    return ids


def _key(config: Config, settings: WarmStartSettings, phases: int) -> str:
    """Returns a hash of all inputs of the first `phases` phases: the model's files, traces and settings, but not the
    layout."""
    digest = hashlib.sha256()
    used = settings.phases[:phases]
    shape = settings.model_dump(mode="json", exclude={"cache_folder", "phases"})
    shape["phases"] = [phase.model_dump(mode="json", exclude={"data"}) for phase in used]
    digest.update(json.dumps([VERSION, config.actor.dtype, shape], sort_keys=True).encode())
    for path in [*sorted(p for p in config.model.path.iterdir() if p.is_file()), *(phase.data for phase in used)]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
