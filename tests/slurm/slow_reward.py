"""A slow reward, for a run that takes long without loading the machine."""

from __future__ import annotations

import time

from megatron_rl.types import RewardResult, Sample


def grade(sample: Sample) -> RewardResult:
    time.sleep(2)
    return RewardResult(float(len(sample.text) % 2))
