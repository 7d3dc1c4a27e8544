"""The embedded engine, as the rest of the program knows it."""

from __future__ import annotations

from megatron_rl.rollout.engines.kind import EngineKind

KIND = EngineKind(
    name="transformers",
    engine="megatron_rl.rollout.engines.transformers.engine:launch_engine",
    remedy="can transformers load model.path? Does the model fit beside what else runs here?",
)
