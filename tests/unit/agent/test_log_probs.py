"""The log-prob contract holds for agents: the recorder's log-probs are those of the model on the recorded ids."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.agent.session import Session
from megatron_rl.batching.sequences import sequences_of
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import Ids, Response, SamplingParams
from tests.hf_models import hf_model
from tests.unit.agent.kit import ROOM, THINKING_REMOVED, converse, sampling, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    size = len(tokenizer())
    hf_model("qwen3", vocab_size=size, max_position_embeddings=1024, initializer_range=0.3).save_pretrained(folder)
    return folder


def test_log_probs_are_those_of_the_model_on_the_recorded_ids(model: Path) -> None:
    engine = TransformersEngine(model, "cpu", "float32")

    async def sample(prompt: Ids, sampling: SamplingParams) -> Response:
        ((response,),) = engine.generate([prompt.tolist()], replace(sampling, max_tokens=8))
        return response

    rng = random.Random(0)
    session = Session(tokenizer(THINKING_REMOVED), sample, sampling(), ROOM)
    asyncio.run(converse(session, rng, ["extend", "branch", "extend", "compact", "extend", "branch"]))
    batch = sequences_of([((0,), session.recorded((0,), None))])
    assert len(batch) > 1
    with torch.inference_mode():
        for row in range(len(batch)):
            ids = torch.from_numpy(batch.sequence(row).astype(np.int64))
            log_p = torch.log_softmax(engine.model(ids[None]).logits[0].float(), -1)
            mine = log_p[:-1].gather(-1, ids[1:, None]).squeeze(-1)[torch.from_numpy(batch.mask_of(row)[1:])]
            recorded = batch.values_of([row], batch.values["rollout_log_probs"])
            assert np.abs(mine.numpy() - recorded).max() < 1e-4
