"""Records of a step's rollouts: all of them, or some complete groups of a large step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.rollout.dump import DumpedResponse, write_rollouts
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.utils.files import atomically

MOST_TIME = 0.02
"""Share of a run's time that dumps may take, unless the configuration asks for a dump of every step."""
CANDIDATES = 64
CANDIDATE_ROWS, CANDIDATE_TOKENS, CANDIDATE_POSITIONS = 8, 512, 512
"""Bounds on the positions whose next-token candidates are recorded: sequences, tokens of each, positions in all."""


@dataclass
class Cost:
    """Seconds that recording has taken so far, and whether there is time for more."""

    run: float = 0.0
    """All steps together."""
    recording: float = 0.0
    last: float = 0.0
    """The last dump; the next one is assumed to cost as much."""

    def step(self, seconds: float, recording: float) -> None:
        """Adds a step's seconds, and the share of them that recording took."""
        self.run += seconds
        self.recording += recording
        self.last = recording or self.last

    @property
    def affordable(self) -> bool:
        """Whether there is time for another dump. The first dump is always affordable: its cost is not known yet."""
        return not self.last or self.recording + self.last <= MOST_TIME * self.run


def record(
    folder: Path,
    step: int,
    rollouts: Rollouts,
    sequences: SequenceBatch,
    advantages: Array,
    scores: Mapping[str, Array],
    *,
    most_tokens: int,
) -> Path:
    """Writes a dump of at most `most_tokens` sampled tokens, but at least one group, and returns its path.

    Args:
        sequences: the N sequences to train on, with `selected` if the loss selects tokens.
        advantages: [N].
        scores: name -> [T], the actor's scores of each sampled token; see `training.batch.PolicyScores`.
    """
    groups, recorded = rollouts.group_numbers, rollouts.sequences
    rows = recorded_rows(groups, sequences.sampled_lengths, step, most_tokens)
    columns = {
        "actor_log_probs" if name == "log_probs" else name: sequences.values_of(rows, values)
        for name, values in scores.items()
    }
    if "in_filter" in columns:  # NaN where the actor did not score, which a bool cannot say
        columns["kept"] = columns.pop("in_filter").astype(np.float32)
    if "selected" in sequences.values:
        columns["selected"] = sequences.values_of(rows, sequences.values["selected"])
    chosen = [(row, *recorded[row]) for row in rows.tolist()]
    masks = [sequence.sampled_mask for _, _, _, sequence, _ in chosen]
    dumped = [
        DumpedResponse(int(groups[row]), prompt, sequence, reward, float(advantages[row]), number)
        for row, number, prompt, sequence, reward in chosen
    ]
    return write_rollouts(
        folder, step, dumped, {name: _per_response(values, masks) for name, values in columns.items()}
    )


def _per_response(values: Array, masks: list[Array]) -> list[Array]:
    """Splits values [T] of sampled tokens into one array per response, over all of its tokens: NaN, or False, for the
    tokens that were not sampled."""
    found, start = [], 0
    for mask in masks:
        count = int(np.count_nonzero(mask))
        part = values[start : start + count]
        start += count
        if count < len(mask):
            whole = (
                np.zeros(len(mask), dtype=bool) if values.dtype == bool else np.full(len(mask), np.nan, values.dtype)
            )
            whole[mask] = part
            part = whole
        found.append(part)
    return found


def recorded_rows(groups: Array, lengths: Array, step: int, most_tokens: int) -> Array:
    """Returns the indices of the responses of some complete groups with at most `most_tokens` tokens in all, or of the
    smallest group. Every step draws other groups."""
    number = np.asarray(groups)
    if lengths.sum() <= most_tokens:
        return np.arange(len(number))
    sizes = {int(group): int(lengths[number == group].sum()) for group in np.unique(number)}
    kept: list[int] = []
    for group in np.random.default_rng(step).permutation(list(sizes)).tolist():
        if sum(sizes[other] for other in kept) + sizes[group] <= most_tokens:
            kept.append(group)
    return np.flatnonzero(np.isin(number, kept or min(sizes, key=lambda group: sizes[group])))


def candidate_positions(batch: SequenceBatch, step: int) -> SequenceBatch:
    """Returns the beginnings of a few sequences, with some of their sampled tokens marked as `wanted`. `row` is the
    index of the sequence in the batch, `position` the place among the sampled tokens of the sequence."""
    random = np.random.default_rng(step)
    rows = np.sort(random.permutation(len(batch))[:CANDIDATE_ROWS])
    ids, masks = [], []
    for row in rows.tolist():
        mask = batch.mask_of(row)
        beyond = np.flatnonzero(mask)[CANDIDATE_TOKENS:]
        end = int(beyond[0]) if len(beyond) else len(mask)
        ids.append(batch.sequence(row)[:end])
        masks.append(mask[:end])
    part = SequenceBatch.joined(ids, masks)
    wanted = np.zeros(part.num_sampled_tokens, dtype=bool)
    wanted[random.permutation(len(wanted))[:CANDIDATE_POSITIONS]] = True
    firsts = np.cumsum(part.sampled_lengths) - part.sampled_lengths
    position = np.arange(len(wanted)) - part.per_token(firsts)
    return part.with_values(wanted=wanted, row=part.per_token(rows), position=position)


def write_candidates(folder: Path, step: int, part: SequenceBatch, found: Mapping[str, Array]) -> Path:
    """Writes `folder/step_000010.parquet`, one row per marked position, with its likeliest next tokens in order."""
    marked = part.values["wanted"]
    table = pa.table(
        {
            "step": np.full(int(marked.sum()), step),
            "row": part.values["row"][marked],
            "position": part.values["position"][marked],
            "token_id": part.targets[marked],
            "candidate_ids": list(found["candidate_ids"][marked].astype(np.int32)),
            "candidate_log_probs": list(found["candidate_log_probs"][marked].astype(np.float32)),
        }
    )
    path = folder / f"step_{step:06d}.parquet"
    with atomically(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    return path
