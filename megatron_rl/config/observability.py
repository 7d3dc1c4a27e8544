"""The `observability` section: what a run shows, records and warns of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, Name, Section, Text

WORD_CLASSES: dict[str, list[str]] = {
    "exploratory": ["but", "wait", "perhaps", "alternatively", "however"],
    "irrelevant": ["cost", "fine", "balanced", "ere", "trans"],
}
"""The paper's two lists (arXiv 2510.03222)."""


class ObservabilitySettings(Section):
    """What a run shows and records."""

    view: Literal["auto", "live", "plain", "off"] = "auto"
    """On the terminal; auto: live on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    rollouts_every: Count = 10
    """Steps between dumps of a step's rollouts; 0: none."""
    word_classes: dict[Name, Annotated[list[Text], Field(min_length=1)]] = WORD_CLASSES
    """Words that the report's figures follow, by class; a token belongs to a class when its text, without blanks and in
    lower case, is one of its words. The default is the paper's."""
