"""UP: the plain policy gradient where the advantage is positive, dual-clip PPO elsewhere (arXiv 2607.06987)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, Range, ShareOrZero, same_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class UPSettings(MethodSettings):
    """Bounds of the ratio of tokens without a positive advantage."""

    clip_low: ShareOrZero = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_dual: Annotated[float, Range(1.0, open_low=True)] = 10.0
    """The ratio counts up to clip_dual."""


class UP(PolicyLoss):
    """-A p / stop(p) if A > 0, otherwise -A clip(r, 1 - clip_low, clip_dual), averaged over tokens.

    A token of positive advantage has the gradient of log p, without a weight, wherever the ratio is. The clip of the
    other tokens is dual-clip PPO's. On-policy the loss is the plain policy gradient.
    """

    name = "up"
    Settings = UPSettings
    settings: UPSettings
    # UP is not in the table of Lp-Reg's paper.
    presets: ClassVar = same_presets(clip_low=0.2, clip_dual=10.0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted, positive = inputs.ratio, inputs.counted, inputs.advantages > 0
        unweighted = (inputs.log_probs - inputs.log_probs.detach()).exp()
        bounded = ratio.clamp(1 - self.settings.clip_low, self.settings.clip_dual)
        loss = token_mean(-inputs.advantages * torch.where(positive, unweighted, bounded), counted, inputs.denominator)
        clipped = (bounded != ratio) & (inputs.advantages < 0)
        return LossOutput(loss, {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(clipped, counted)})
