"""A mixture of experts in a real server: log-probs, and weights that arrive expert by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.types import SamplingParams
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import FolderUpdate
from tests.engines.conftest import Run, launch
from tests.engines.test_generate import largest_gap
from tests.engines.updates import tensors
from tests.hf_models import write_hf_model

PROMPTS = [(1, 5, 7), (2, 3)]
SAMPLING = SamplingParams(n=4, max_tokens=20, temperature=1.0, stop_token_ids=(49,), seed=1)


@pytest.mark.sglang
def test_experts_take_new_weights(run: Run[Any], tmp_path: Path) -> None:
    shape = {"tie_word_embeddings": False, "initializer_range": 0.3, "head_dim": 32}
    before, after = (write_hf_model(tmp_path / str(seed), "qwen3_moe", seed=seed, **shape) for seed in (0, 1))
    engine = HttpEngine(launch("sglang", before))

    def gap(model: Path) -> float:
        groups = run(engine.generate(PROMPTS, SAMPLING))
        pairs = [(prompt, response) for prompt, group in zip(PROMPTS, groups, strict=True) for response in group]
        return max(largest_gap(model, prompt, response, 1.0) for prompt, response in pairs)

    run(engine.start())
    try:
        run(engine.resume())
        assert gap(before) < 1e-4
        transport = FolderTransport(tmp_path / "update", 0, bucket_bytes=100_000)
        transport.connect()
        pushed = transport.push(tensors(after), 4, ChecksumTaker(1))
        update = FolderUpdate(4, pushed.parts, take_checksums=True)
        run(engine.pause())
        run(engine.update_weights(update))
        assert pushed.checksums and run(engine.verify_weights(4, pushed.checksums)) > 10
        run(engine.resume())
        assert gap(after) < 1e-4
    finally:
        run(engine.close())
