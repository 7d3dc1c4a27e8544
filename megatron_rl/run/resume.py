"""Resumes a run from a checkpoint: checks that it can, restores the state, and reports what has changed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from megatron_rl import __version__
from megatron_rl.actor.platform import megatron_version
from megatron_rl.checkpoint import rng
from megatron_rl.checkpoint.manifest import DataFile, ModelFolder, Origin, read_rng
from megatron_rl.checkpoint.rollout_buffer import read_buffer
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import file_sha256, read_config
from megatron_rl.observability.metrics import FILE_NAME, has_metrics, is_unchanged, read_metrics
from megatron_rl.parallel.layout import layout_of
from megatron_rl.reward.decode import decoder_of
from megatron_rl.rollout.buffer import RolloutBuffer
from megatron_rl.rollout.collector import RolloutCollector
from megatron_rl.run.folder import Resumption
from megatron_rl.run.run import Run


def data_file(config: Config) -> DataFile:
    """Returns the file of training prompts as a checkpoint names it."""
    return DataFile(str(config.data.train), file_sha256(config.data.train))


def origin_of(config: Config, reference: ModelFolder | None = None, data: DataFile | None = None) -> Origin:
    """Returns the description of this run (model, layout, versions, data) that is written into its checkpoints."""
    return Origin(
        model=asdict(Architecture.from_hf(read_config(config.model.path))),
        layout=asdict(layout_of(config.actor)),
        dtype=config.actor.dtype,
        versions={"megatron-rl": __version__, "megatron-core": megatron_version(), "torch": torch.__version__},
        reference=reference,
        data=data,
    )


def check_resumption(config: Config, resumption: Resumption) -> None:
    """Raises UserError if the checkpoint belongs to another model."""
    there, here = resumption.manifest.origin.model, origin_of(config).model
    different = [f"{key} is {there[key]} there, {here[key]} here" for key in there if there[key] != here.get(key)]
    if different:
        raise UserError(
            f"{resumption.checkpoint} is a checkpoint of another model than {config.model.path} "
            f"({'; '.join(different)}): resume with the model.path the run was started with"
        )


def same_data(config: Config, data: DataFile, resumption: Resumption) -> bool:
    """Whether the checkpoint's position in the data and its rollout buffer are those of this run's training file.

    Raises UserError if the file is another one and `data.allow_changed` is not set. A checkpoint of an earlier version
    does not name its file, and counts as one of the same file.
    """
    before = resumption.manifest.origin.data
    if before is None or before.sha256 == data.sha256:
        return True
    if config.data.allow_changed:
        return False
    raise UserError(
        f"data.train: {data.path} is not the file that {resumption.checkpoint} was trained on ({before.path}): its "
        f"SHA-256 is {data.sha256[:16]}..., there it is {before.sha256[:16]}.... Resume with that file, or begin with "
        "the first prompt of this one by data.allow_changed=true"
    )


def changed_metrics(folder: Path, resumption: Resumption | None) -> list[str]:
    """Returns a message if the lines of metrics.jsonl up to the checkpoint are not those that the run wrote."""
    if resumption is None:
        return []
    manifest = resumption.manifest
    written, step = manifest.state.metrics_log, manifest.state.step
    if written is None or not resumption.checkpoint.resolve().is_relative_to(folder.resolve()):
        return []
    last = [row for row in read_metrics(folder) if row["step"] == step]
    if is_unchanged(folder, written) and all(has_metrics(row, manifest.metrics) for row in last):
        return []
    return [
        f"CHANGED METRICS: {folder / FILE_NAME} is not what the run wrote up to step {step}: lines are missing or have "
        "other values. Training does not depend on them, and goes on."
    ]


def resume(run: Run, resumption: Resumption, *, with_buffer: bool) -> None:
    """Restores all state except the cursor, with which the run was opened. `with_buffer`: whether the groups of the
    rollout buffer are of this run's training file."""
    checkpoint, manifest = resumption.checkpoint, resumption.manifest
    run.actors.load(checkpoint)
    rng.restore(read_rng(checkpoint).driver)
    if isinstance(run.rollouts, RolloutCollector) and with_buffer:
        run.rollouts.buffer = _buffer(run, checkpoint)
    run.resumed, run.step, run.learner.weight_version = True, manifest.state.step, manifest.state.weight_version
    run.learner.entropy_coefficient = manifest.state.entropy_coefficient
    if all(row["step"] != run.step for row in read_metrics(run.folder)):  # the run was killed before it wrote metrics
        run.metrics.write(run.step, manifest.metrics)
    for line in _report(run, resumption, with_buffer):
        run.view.message(line)


def _buffer(run: Run, checkpoint: Path) -> RolloutBuffer:
    """Reads the checkpoint's rollout buffer. Groups of another size than this run's are restarted."""
    samples = run.config.rollout.samples_per_prompt
    groups = read_buffer(checkpoint, run.inputs.train.prompts, decoder_of(run.inputs.tokenizer))
    return RolloutBuffer.of(
        group if len(group.responses) == samples else group.restarted(group.oldest_version) for group in groups
    )


def _report(run: Run, resumption: Resumption, with_buffer: bool) -> list[str]:
    there, here = resumption.manifest.origin, origin_of(run.config)
    lines = [f"DAMAGED CHECKPOINT PASSED OVER: {problem}" for problem in resumption.damaged]
    lines.append(f"resumed from {resumption.checkpoint} (step {run.step})")
    if not with_buffer:
        lines.append(f"the run begins with the first prompt of {run.config.data.train}, another file than there")
    if there.layout != here.layout:
        lines.append(
            f"written under {there.layout_in_words}, now {here.layout_in_words}: weights and optimizer state "
            "are exact, the ranks' random states are new, and sums in another order round differently from here on"
        )
    if there.dtype != here.dtype:
        lines.append(f"written by a {there.dtype} run, now {here.dtype}: main weights and optimizer state are exact")
    return lines
