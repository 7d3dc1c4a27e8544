"""What of a step's rollouts is recorded: all of it, or of a large step some whole groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.observability.rollouts import write_rollouts
from megatron_rl.types import Sample
from megatron_rl.utils.files import atomically

MOST_TIME = 0.02
"""Share of a run's time that dumps may take, unless every step is to have one."""
CANDIDATES = 64
CANDIDATE_ROWS, CANDIDATE_TOKENS, CANDIDATE_POSITIONS = 8, 512, 512
"""The sample whose next-token candidates are recorded: rows, tokens of each, positions of all."""


@dataclass
class Cost:
    """What recording has cost so far, in seconds, and whether there is time for more of it."""

    run: float = 0.0
    """All steps."""
    recording: float = 0.0
    last: float = 0.0
    """Of the last dump; the next is taken to cost as much."""

    def step(self, seconds: float, recording: float) -> None:
        """After a step that took so long, with what recording took of it."""
        self.run += seconds
        self.recording += recording
        self.last = recording or self.last

    @property
    def affordable(self) -> bool:
        """The first always is: its cost is not known yet."""
        return not self.last or self.recording + self.last <= MOST_TIME * self.run


def record(
    folder: Path,
    step: int,
    samples: Sequence[Sample],
    advantages: Array,
    batch: SequenceBatch,
    seen: Mapping[str, Array],
    *,
    most_tokens: int,
) -> Path:
    """Write a dump of at most so many response tokens (one group at least), and return its path.

    advantages: [N]. batch: the N samples as rows, with `selected` where a loss selects. seen: name -> [T], what the
    actor said of each token.
    """
    rows = recorded_rows([sample.group for sample in samples], batch.response_lengths, step, most_tokens)
    index, part = batch.token_index(rows), batch.take(rows)
    columns = {"actor_log_probs" if name == "log_probs" else name: values[index] for name, values in seen.items()}
    if "kept" in columns:  # NaN where the actor did not look, which a bool cannot say
        columns["kept"] = columns["kept"].astype(np.float32)
    if "selected" in part.values:
        columns["selected"] = part.values["selected"]
    ends = np.cumsum(part.response_lengths)[:-1]
    per_token = {name: np.split(values, ends) for name, values in columns.items()}
    return write_rollouts(folder, step, [samples[i] for i in rows], advantages[rows].tolist(), per_token)


def recorded_rows(groups: Sequence[int], lengths: Array, step: int, most_tokens: int) -> Array:
    """Rows of whole groups with at most so many tokens together, or of the smallest; every step draws groups anew."""
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
    """A few rows, their starts only, some of whose response tokens are marked as `wanted`; `row` is where they came
    from, `position` the place in the response."""
    random = np.random.default_rng(step)
    rows = np.sort(random.permutation(len(batch))[:CANDIDATE_ROWS])
    lengths = np.minimum(batch.response_lengths[rows], CANDIDATE_TOKENS)
    part = SequenceBatch(
        tokens=[batch.tokens[i][: batch.prompt_lengths[i] + n] for i, n in zip(rows, lengths, strict=True)],
        prompt_lengths=batch.prompt_lengths[rows],
    )
    wanted = np.zeros(part.num_response_tokens, dtype=bool)
    wanted[random.permutation(len(wanted))[:CANDIDATE_POSITIONS]] = True
    position = np.concatenate([np.arange(n) for n in lengths]) if len(rows) else np.zeros(0, dtype=np.int64)
    return part.with_values(wanted=wanted, row=part.per_token(rows), position=position)


def write_candidates(folder: Path, step: int, part: SequenceBatch, found: Mapping[str, Array]) -> Path:
    """`folder/step_000010.parquet`: a row a marked position, with its likeliest next tokens, the likeliest first."""
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
        pq.write_table(table, partial, compression="zstd")
    return path
