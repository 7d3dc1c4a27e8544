"""Complete groups of responses for the viewer: every token with its probability and its marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.evaluation.problems import RIGHT

from .tokens import Vocabulary, read_dump

GROUPS_PER_STEP = 4
SAMPLES_PER_GROUP = 8
TOKENS_PER_SAMPLE = 1500
FILTERED, SELECTED, NOT_SAMPLED = 1, 2, 4
"""Bits of the mark of a token."""


def response_groups(dumps: Sequence[tuple[int, Path]], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Returns some groups of each dump. Groups with non-zero advantages come first, because the loss acts on them."""
    return [group for step, path in dumps for group in _groups_of(step, path, vocabulary)]


def _groups_of(step: int, path: Path, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    table = read_dump(path)
    number = np.asarray(table.column("group"))
    advantages = np.asarray(table.column("advantage"), dtype=np.float64)
    groups = list(dict.fromkeys(number.tolist()))
    groups.sort(key=lambda group: not np.any(advantages[number == group]))
    return [
        _group(step, table.take(np.flatnonzero(number == group)[:SAMPLES_PER_GROUP]).to_pylist(), vocabulary)
        for group in groups[:GROUPS_PER_STEP]
    ]


def _group(step: int, rows: list[dict[str, Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": rows[0]["prompt_id"],
        "prompt": rows[0]["prompt"],
        "label": rows[0].get("label"),
        "samples": [_sample(row, vocabulary) for row in rows],
    }


def _sample(row: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    ids = row["token_ids"][:TOKENS_PER_SAMPLE]
    blank = [None] * len(ids)
    actor, kept, selected, sampled = (
        row.get(name) or blank for name in ("actor_log_probs", "kept", "selected", "sampled_mask")
    )
    log_probs = [
        engine if looked is None or not np.isfinite(looked) else looked
        for engine, looked in zip(row["log_probs"], actor, strict=False)
    ]
    return {
        "reward": row["reward"],
        "verdict": _verdict(row),
        "advantage": round(row["advantage"], 3),
        "answer": row["answer"],
        "detail": row["detail"],
        "finish": row["finish_reason"],
        "cut": len(row["token_ids"]) - len(ids),
        "texts": [vocabulary.text(token) for token in ids],
        "p": [_known(np.exp(value)) for value in log_probs[: len(ids)]],
        "entropy": [_known(value) for value in (row.get("entropy") or blank)[: len(ids)]],
        "marks": [
            NOT_SAMPLED if there is False else FILTERED * (k == 0) + SELECTED * (s == 1)
            for k, s, there in zip(kept, selected, sampled, strict=False)
        ][: len(ids)],
    }


def _verdict(row: dict[str, Any]) -> str:
    """Returns `right`, `wrong` or `not graded`, by the measure of pass@k."""
    if (row.get("outcome") or "score") != "score":
        return "not graded"
    return "right" if row["reward"] > RIGHT else "wrong"


def _known(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.3g}")
