"""Fresh tokens were sampled by the weights in training, and with nothing that older weights computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config import Config
from megatron_rl.config.remarks import aborted_requests
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.batch import training_batch
from megatron_rl.types import Prompt, Response, RewardResult

CHANGED = Response([5, 6, 7], [-0.1, -0.2, -0.3], "stop", 1, ((1, 2),))
NEW = Response([8, 9], [-0.4, -0.5], "stop", 2)


def config_of(tmp_path: Path, **rollout: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "x", "folder": str(tmp_path)},
            "model": {"path": "x"},
            "data": {"train": "x.jsonl"},
            "algorithm": {"correction": {"weights": "truncated"}},
            "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_response_tokens": 4, "max_staleness": 1}
            | {"engine": "vllm", "asynchronous": True, "recompute_kv_cache": False, **rollout},
            "reward": {"name": "math"},
            "train": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("rollout", "kept"),
    [
        ({}, True),
        ({"recompute_kv_cache": True}, False),
        ({"asynchronous": False}, False),
        ({"engine": "transformers"}, False),
        ({"engine": "sglang"}, False),
    ],
)
def test_the_rest_of_a_kept_response_is_not_fresh(tmp_path: Path, rollout: dict[str, Any], kept: bool) -> None:
    config = config_of(tmp_path, **rollout)
    assert config.keeps_requests == kept
    wanted = config.rollout.asynchronous and not config.rollout.recompute_kv_cache
    assert len(aborted_requests(config)) == (wanted and not kept)
    prompt, rewards = Prompt("p:0", (1, 2), "", None), (RewardResult(1.0), RewardResult(0.0))
    asked = Group(0, 0, prompt, 2, (CHANGED, NEW), rewards)
    waited = Group(1, 1, prompt, 1, (NEW, NEW), rewards)  # asked for before the update, and sampled after it
    rollouts = Rollouts([asked, waited], np.ones(2, bool), 2)
    batch, _ = training_batch(config, rollouts, lambda found: [r.score for r in found])
    assert batch.fresh.tolist() == [False, not kept, not kept, True, True] + [not kept] * 4
