"""The transport of weights if the configuration leaves it open."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.transport import transport_of

MINIMAL = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10}
"""


@pytest.mark.parametrize(
    ("overrides", "transport"),
    [
        ([], "shared_memory"),
        (["actor.device=cuda"], "shared_memory"),
        (["rollout.engine=vllm", "actor.device=cpu"], "shared_memory"),
        (["rollout.engine=vllm", "actor.device=cuda"], "collective"),
        (["rollout.engine=sglang", "actor.device=cuda", "cluster.nodes=2"], "collective"),
        (["rollout.engine=sglang", "actor.device=cuda", "cluster.colocate=true"], "shared_memory"),
        (["rollout.engine=sglang", "actor.device=cuda", "cluster={nodes: 2, colocate: true}"], "shared_memory"),
        (["rollout.engine=transformers", "cluster.nodes=2", "actor.device=cpu"], "disk"),
        (["rollout.engine=sglang", "weight_sync.transport=disk"], "disk"),
        (
            [
                *("rollout.engine=vllm", "actor.device=cuda", "cluster.colocate=true"),
                "weight_sync={transport: cuda_ipc, bucket_megabytes: 128}",
            ],
            "cuda_ipc",
        ),
    ],
)
def test_auto_resolves_to_a_transport(overrides: list[str], transport: str, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(MINIMAL)
    assert transport_of(load_config(path, overrides)) == transport
