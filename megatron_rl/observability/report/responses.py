"""Complete groups of responses for the viewer: every token with its probability and its marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.evaluation.problems import RIGHT

from .tokens import Vocabulary, read_dump
from .turns import turns_of

GROUPS_PER_STEP = 4
SAMPLES_PER_GROUP = 8
TOKENS_PER_SAMPLE = 1500
FILTERED, SELECTED, NOT_SAMPLED = 1, 2, 4
"""Bits of the mark of a token."""


def response_groups(dumps: Sequence[tuple[int, Path]], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Returns some groups of each dump. Groups with non-zero advantages come first, because the loss acts on them. The
    sequences that an agent sampled have their own contexts."""
    return [group for step, path in dumps for group in _groups_of(step, path, vocabulary)]


def _groups_of(step: int, path: Path, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    table = read_dump(path)
    number = np.asarray(table.column("group"))
    advantages = np.asarray(table.column("advantage"), dtype=np.float64)
    groups = list(dict.fromkeys(number.tolist()))
    groups.sort(key=lambda group: not np.any(advantages[number == group]))
    chosen = [table.take(np.flatnonzero(number == group)).to_pylist() for group in groups[:GROUPS_PER_STEP]]
    agent = any(map(_is_by_agent, chosen))
    return [_group(step, rows, vocabulary, agent) for rows in chosen]


def _is_by_agent(rows: list[dict[str, Any]]) -> bool:
    """Whether an agent sampled the responses of a group. A dump of an earlier version shows it only if tokens were
    given within the responses, or if a response has several sequences."""
    known = any(row.get("tool_calls") is not None or False in (row.get("sampled_mask") or ()) for row in rows)
    return known or len({_rollout(place, row) for place, row in enumerate(rows)}) < len(rows)


def _rollout(place: int, row: dict[str, Any]) -> int:
    """Number of the response that a row belongs to. A dump of an earlier version has one row per response."""
    number = row.get("rollout")
    return place if number is None else int(number)


def _group(step: int, rows: list[dict[str, Any]], vocabulary: Vocabulary, agent: bool) -> dict[str, Any]:
    numbers = [_rollout(place, row) for place, row in enumerate(rows)]
    shown = list(dict.fromkeys(numbers))[:SAMPLES_PER_GROUP]
    return {
        "step": step,
        "prompt_id": rows[0]["prompt_id"],
        "prompt": rows[0]["prompt"],
        "label": rows[0].get("label"),
        "samples": [
            _sample(row, vocabulary, agent)
            | {
                "rollout": number,
                "sequence": numbers[: place + 1].count(number),
                "sequences": numbers.count(number),
            }
            for place, (number, row) in enumerate(zip(numbers, rows, strict=True))
            if number in shown
        ],
    }


def _sample(row: dict[str, Any], vocabulary: Vocabulary, agent: bool) -> dict[str, Any]:
    """One sequence. The tokens of its context come first if its agent chose another one than the prompt."""
    context = row["prompt_token_ids"] if agent else []
    if _squeezed("".join(map(vocabulary.text, context))) == _squeezed(row["prompt"]):
        context = []
    before = context[-TOKENS_PER_SAMPLE:]
    ids = row["token_ids"][:TOKENS_PER_SAMPLE]
    blank = [None] * len(ids)
    actor, kept, selected, sampled = (
        row.get(name) or blank for name in ("actor_log_probs", "kept", "selected", "sampled_mask")
    )
    log_probs = [
        engine if looked is None or not np.isfinite(looked) else looked
        for engine, looked in zip(row["log_probs"], actor, strict=False)
    ]
    texts = [vocabulary.text(token) for token in [*before, *ids]]
    seen = [NOT_SAMPLED] * len(before)
    marks = (
        seen
        + [
            NOT_SAMPLED if there is False else FILTERED * (k == 0) + SELECTED * (s == 1)
            for k, s, there in zip(kept, selected, sampled, strict=False)
        ][: len(ids)]
    )
    turns = turns_of(texts, [not mark & NOT_SAMPLED for mark in marks]) if agent else []
    if context and not turns:
        turns = [("prompt", 0), ("response", len(before))]
    return {
        "reward": row["reward"],
        "verdict": _verdict(row),
        "advantage": round(row["advantage"], 3),
        "answer": row["answer"],
        "detail": row["detail"],
        "finish": row["finish_reason"],
        "tokens": len(row["token_ids"]) if row.get("sampled_mask") is None else sum(row["sampled_mask"]),
        "earlier": len(context) - len(before),
        "cut": len(row["token_ids"]) - len(ids),
        "texts": texts,
        "p": [None] * len(before) + [_known(np.exp(value)) for value in log_probs[: len(ids)]],
        "entropy": [None] * len(before) + [_known(value) for value in (row.get("entropy") or blank)[: len(ids)]],
        "marks": marks,
        "turns": turns,
    }


def _squeezed(text: str) -> str:
    """The text without white space, which word-level tokens lack."""
    return "".join(text.split())


def _verdict(row: dict[str, Any]) -> str:
    """Returns `right`, `wrong` or `not graded`, by the measure of pass@k."""
    if (row.get("outcome") or "score") != "score":
        return "not graded"
    return "right" if row["reward"] > RIGHT else "wrong"


def _known(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.3g}")
