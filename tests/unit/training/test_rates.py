"""The operations of a step are those of its own scoring and training: no warm start, evaluation or check counts."""

from __future__ import annotations

from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import pytest

from megatron_rl import loop
from megatron_rl.run.run import Run


def test_a_step_counts_its_own_passes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = SimpleNamespace(flops=1e15)  # a warm start and an evaluation before the step

    def adds(flops: float, result: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            actors.flops += flops
            return result

        return call

    monkeypatch.setattr(loop, "score_old_policy", adds(1.0, "batch"))
    monkeypatch.setattr(loop, "select", adds(0.0, ("batch", {"a": 1.0})))
    monkeypatch.setattr(loop, "score_lagged_policy", adds(2.0, "batch"))
    monkeypatch.setattr(loop, "score_reference", adds(4.0, "batch"))
    monkeypatch.setattr(loop, "update", adds(8.0, ("batch", {})))
    monkeypatch.setattr(loop, "selection_overlap", lambda *_: {})
    run: Any = SimpleNamespace(
        config=SimpleNamespace(observability=SimpleNamespace(profile=())),
        learner=None,
        actors=actors,
        seed=lambda step: 0,
        release_engines=lambda: None,
        phase=lambda name: nullcontext(),
        learning_rate=lambda step: 1.0,
        sync_weights=adds(1e15, {"synced": 1.0}),  # the log-prob contract scores samples of the engines
    )
    run.measured, run._traced = MethodType(Run.measured, run), MethodType(Run._traced, run)
    for step in (1, 2):
        _, metrics = loop.learn(run, step, "batch")  # type: ignore[arg-type]
        assert run.step_flops == 15.0 and metrics == {"a": 1.0, "synced": 1.0}
