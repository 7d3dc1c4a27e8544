"""An agent whose turns real servers answer: the log-probs are those of the actor, in every sequence."""

from __future__ import annotations

from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from megatron_rl.rollout.dump import dumps
from tests.e2e_cpu.conftest import CommandLine, values
from tests.e2e_cpu.own_agents import HINT
from tests.engines.conftest import KINDS
from tests.engines.test_training import PROMPTS, SAMPLES, Training

STEPS = 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_trains_with_a_server(command_line: CommandLine, kind: str) -> None:
    agent = "rollout.agent={function: tests.e2e_cpu.own_agents:with_hints}"
    run = Training(command_line, kind, f"agent_{kind}", agent, "reward.name=agent", f"train.steps={STEPS}").end()
    assert run.status == 0, run.output[-5000:]
    assert max(values(run, "logprob/rollout_actor_max_diff")) < 1e-3
    rows = [row for _, path in dumps(run.folder / "rollouts") for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 2 * STEPS * PROMPTS * SAMPLES
    for first, second in pairwise(rows):
        if first["rollout"] == second["rollout"]:
            hints = [
                token for token, sampled in zip(first["token_ids"], first["sampled_mask"], strict=True) if not sampled
            ]
            assert hints == [HINT, HINT] and all(second["sampled_mask"])
            assert first["prompt_token_ids"] == second["prompt_token_ids"]
