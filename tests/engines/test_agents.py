"""Agents train through real servers: every token of a program with the `openai` package is recorded and trained as the
server sampled it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.rollout.dump import dumps
from megatron_rl.rollout.servers.http_engine import HttpEngine
from tests.e2e_cpu.conftest import CommandLine, Finished, values
from tests.engines.agents import TEMPLATE
from tests.engines.conftest import Run
from tests.engines.fault_proxy import Script, fault_proxy
from tests.engines.test_training import PROMPTS, SAMPLES, Training

STEPS = 2


def prompts_sent(script: Script) -> Iterator[tuple[int, ...]]:
    """Token ids of every prompt that the server got."""
    for path, body in script.bodies:
        if path == "/generate":
            yield tuple(json.loads(body)["input_ids"])
        elif path == "/arrays/generate":
            yield from (tuple(request["token_ids"]) for request in json.loads(body))


def trained(lent: HttpEngine, command_line: CommandLine, script: Script, name: str, *overrides: str) -> Finished:
    """A run whose agent is a program with the `openai` package. The model has a chat template."""
    task = command_line.folder / "runs/countdown-task"
    chat = command_line.folder / "chat-model"
    if not chat.exists():
        shutil.copytree(task / "model", chat)
        tokenizer = load_tokenizer(chat)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(chat)
    with fault_proxy(script, "") as url:
        ended = Training(
            command_line,
            lent.kind.name,
            f"{name}-{lent.kind.name}",
            f"rollout.server.urls=[{url}]",
            "rollout.agent={function: tests.engines.agents:two_turns}",
            f"model.path={chat}",
            *overrides,
        ).end()
    assert ended.status == 0, ended.output[-5000:]
    assert values(ended, "agent/sequences_mean") == [1.0] * len(values(ended, "train/loss"))
    return ended


def test_a_program_with_the_openai_package_trains_through_a_server(
    lent: HttpEngine, run: Run[Any], command_line: CommandLine
) -> None:
    script = Script(lent)
    ended = trained(lent, command_line, script, "agents", f"train.steps={STEPS}")
    assert max(values(ended, "logprob/rollout_actor_max_diff")) < 1e-3
    assert values(ended, "agent/turns_mean") == [2.0] * STEPS

    sent = set(prompts_sent(script))
    words = load_tokenizer(command_line.folder / "chat-model")
    for step, path in dumps(ended.folder / "rollouts"):
        rows = pq.read_table(path).to_pylist()
        assert len(rows) == PROMPTS * SAMPLES
        for row in rows:
            ids, sampled = row["token_ids"], np.array(row["sampled_mask"])
            assert set(row["weight_versions"]) == {step - 1}
            starts = np.flatnonzero(sampled & ~np.append(False, sampled[:-1]))
            assert len(starts) == 2 and words.decode(np.array(ids)[~sampled].tolist()) == "so ok"
            assert all((*row["prompt_token_ids"], *ids[:start]) in sent for start in starts)
            assert np.isfinite(np.array(row["log_probs"])[sampled]).all()
    assert len(list(dumps(ended.folder / "rollouts"))) == STEPS


def test_agents_train_on_a_server_that_goes_on_while_the_actor_trains(
    lent: HttpEngine, run: Run[Any], command_line: CommandLine
) -> None:
    steps = 5
    ended = trained(
        lent,
        command_line,
        Script(lent),
        "asynchronous-agents",
        f"train.steps={steps}",
        "rollout.max_staleness=2",
        "rollout.over_sampling=2",
        "rollout.asynchronous=true",
        "algorithm.correction.weights=truncated",
    )
    assert max(values(ended, "logprob/fresh_abs_diff")) < 1e-4
    assert 1 <= max(values(ended, "rollout/staleness_max")) <= 2
    prompts = []
    for step, path in dumps(ended.folder / "rollouts"):
        rows = pq.read_table(path).to_pylist()
        assert len(rows) == PROMPTS * SAMPLES
        assert {version for row in rows for version in row["weight_versions"]} <= set(range(step - 3, step))
        prompts += sorted({row["prompt_id"] for row in rows})
    assert len(prompts) == len(set(prompts)) == steps * PROMPTS
