"""Samples to score."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rl.types import FinishReason, Prompt, Response, Sample

MakeSample = Callable[..., Sample]


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    def make(text: str, label: Any = None, finish_reason: FinishReason = "stop") -> Sample:
        prompt = Prompt(id="test:0", token_ids=(1,), text="", label=label)
        return Sample(prompt, Response([2], [-0.5], finish_reason, 0), text)

    return make
