"""The check of an export compares few enough logits to fit into memory; a missing report ends no run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.plan.memory import TOKENS_OF_EXPORT_CHECK
from megatron_rl.run import finish
from megatron_rl.types import Response, SamplingParams

ASKED = SamplingParams(n=16, max_tokens=32_000, temperature=1.0, stop_token_ids=(), seed=0)


class Engines:
    def generate(self, prompts: list[Any], sampling: SamplingParams) -> list[list[Response]]:
        """Answers with the longest responses that were asked for."""
        tokens = np.zeros(sampling.max_tokens, dtype=np.int32)
        answer = Response(tokens, np.zeros(len(tokens), dtype=np.float32), "length", 0)
        return [[answer] * sampling.n for _ in prompts]


def test_the_export_is_compared_at_a_few_hundred_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    actors = SimpleNamespace(logits=lambda rows: (seen.append(rows.num_sampled_tokens), np.ones((1, 1)))[1])
    monkeypatch.setattr(finish, "largest_logit_difference", lambda *_: 0.0)
    monkeypatch.setattr(finish, "evaluation_sampling", lambda *_: ASKED)
    prompts = [SimpleNamespace(token_ids=[1, 2, 3])] * 100
    run: Any = SimpleNamespace(
        config=SimpleNamespace(actor=SimpleNamespace(dtype="bfloat16")),
        folder=Path("run"),
        engines=Engines(),
        actors=actors,
        inputs=SimpleNamespace(train=SimpleNamespace(prompts=prompts), stop_token_ids=()),
    )
    assert "largest logit difference" in finish.check_export(run)
    assert seen == [TOKENS_OF_EXPORT_CHECK]


def test_a_report_that_cannot_be_written_is_announced_and_no_error(tmp_path: Path) -> None:
    """A damaged rollout dump is in the way of the report only."""
    (tmp_path / "metrics.jsonl").write_text("broken\n{}\n")
    messages: list[str] = []
    view = SimpleNamespace(phase=lambda name: None, message=messages.append)
    finish.finish(SimpleNamespace(config=None, keeps_weights=False, folder=tmp_path, view=view))  # type: ignore[arg-type]
    assert messages[-1].startswith("NO REPORT: ") and f"megatron-rl report {tmp_path}" in messages[-1], messages
