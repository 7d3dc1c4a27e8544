"""The maths reward as configured: the grader that `reward.math.grader` names."""

from __future__ import annotations

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import RewardResult, Sample

from .verifier import judge, verify_maths


class MathsReward:
    """Scores samples with the standard grader or as the paper's code did."""

    def __init__(self, settings: RewardSettings) -> None:
        self._is_published = settings.math.grader == "published"

    def prepare(self) -> None:
        """Imports the computer algebra system and warms up its parser, which together take seconds.

        Workers call this when they start, so that the time does not count as that of their first sample.
        """
        from . import algebra, published, sets  # noqa: F401

        judge(r"\sqrt{8}+x", r"x+2\sqrt{2}")
        if self._is_published:
            published.accepting_rule(r"\sqrt{8}+x", r"x+2\sqrt{2}")

    def __call__(self, sample: Sample) -> RewardResult:
        """Returns score 1 or 0. Raises ValueError if the label is empty or neither number nor text."""
        if not self._is_published:
            return verify_maths(sample)
        from .published import verify_as_published  # imports sympy, which a login node does not need

        return verify_as_published(sample)
