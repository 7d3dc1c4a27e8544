"""Shaping of rewards by the form of the response. Evaluation uses the verifier's score alone."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.reward import FormatSettings


def well_formed(text: str, tags: Sequence[str]) -> bool:
    """Whether each tag appears exactly once, in the given order. No response can make the search slow."""
    position = 0
    for tag in tags:
        found = text.find(tag)
        if found < position or text.find(tag, found + 1) >= 0:
            return False
        position = found + len(tag)
    return True


def format_penalties(texts: Sequence[str], settings: FormatSettings | None) -> list[float]:
    """Returns the amount to add to each response's reward: 0, or -penalty if the tags are not as required."""
    if settings is None:
        return [0.0] * len(texts)
    return [0.0 if well_formed(text, settings.tags) else -settings.penalty for text in texts]
