"""Shaping of rewards by form. Evaluation never sees it: it reads the verifier's score."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.reward import FormatSettings


def well_formed(text: str, tags: Sequence[str]) -> bool:
    """Whether each tag appears exactly once, one after another. Plain search: no response can make it slow."""
    position = 0
    for tag in tags:
        found = text.find(tag)
        if found < position or text.find(tag, found + 1) >= 0:
            return False
        position = found + len(tag)
    return True


def format_penalties(texts: Sequence[str], settings: FormatSettings | None) -> list[float]:
    """What to add to each response's reward: 0, or -penalty where the tags are not as they must be."""
    if settings is None:
        return [0.0] * len(texts)
    return [0.0 if well_formed(text, settings.tags) else -settings.penalty for text in texts]
