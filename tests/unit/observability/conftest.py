"""The folder of a run: 200 steps, an evaluation every 50, values that vary as in a real run."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.agent.model import Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.agent.tools import calculator
from megatron_rl.config.agent import AgentSettings
from megatron_rl.rollout.dump import DumpedResponse, write_rollouts
from megatron_rl.types import AgentResponse, Prompt, Response, RewardResult
from tests.unit.agent.kit import TextEngines, sampling, tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of the real sinks without their packages."""
    missing = [name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and item.get_closest_marker("sinks"):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}; see make test-sinks"))


CONFIG = """\
run: {name: countdown-lp_reg, folder: null}
seed: 0
model: {path: runs/data/countdown/model}
algorithm: {name: lp_reg, preset: paper, proxy_source: lagged}
train: {steps: 200, save_every: 50}
"""


def training_row(step: int, rng: random.Random) -> dict[str, Any]:
    share = step / 200
    rollout, update = 0.12 + 0.02 * rng.random(), 0.2 + 0.05 * rng.random()
    return {
        "step": step,
        "time": 1.7e9 + 10 + 0.45 * step,
        "train/loss": rng.gauss(0, 0.02),
        "train/grad_norm": None if step == 7 else 0.4 * math.exp(rng.gauss(0, 0.3)),
        "train/lr": 3e-4,
        "reward/mean": min(1.0, 0.25 + 0.5 * share**0.5 + rng.gauss(0, 0.06)),
        "reward/std": 0.45,
        "entropy/token_mean": 0.3 - 0.1 * share + rng.gauss(0, 0.01),
        "entropy/sequence_mean": 0.33 - 0.1 * share + rng.gauss(0, 0.01),
        "response_length/mean": 16 + 8 * share + rng.gauss(0, 0.7),
        "response_length/truncated_fraction": abs(rng.gauss(0, 0.01)),
        "lpreg/delta": 0.05 * math.exp(-4 * share + rng.gauss(0, 0.2)),
        "lpreg/selected_fraction": 0.01 * (1 - share / 2) + rng.gauss(0, 0.001),
        "lpreg/kept_fraction": 0.985 + rng.gauss(0, 0.002),
        "lpreg/kl": 0.02 + abs(rng.gauss(0, 0.01)),
        "lpreg/advantage_shift": 0.05 + abs(rng.gauss(0, 0.02)),
        "logprob/rollout_actor_abs_diff": 2e-6 * math.exp(rng.gauss(0, 0.2)),
        "perf/tokens_per_second": 9000 + rng.gauss(0, 300),
        "perf/tflops_per_second_per_rank": 0.02,
        "perf/rollout_seconds": rollout,
        "perf/reward_seconds": 0.03,
        "perf/train_seconds": update,
        "perf/weight_sync_seconds": 0.01,
        "perf/step_seconds": rollout + update + 0.05,
    }


def evaluation(step: int, suite: str, shift: float) -> dict[str, float]:
    share = step / 200
    return {
        f"eval/{suite}/avg@8": 0.223 + 0.45 * share**0.7 - shift,
        f"eval/{suite}/pass@8": 0.871 + 0.08 * math.sin(3 * share) - shift,
        f"eval/{suite}/entropy": 0.303 - 0.1 * share,
        f"eval/{suite}/response_length": 16.2 + 8 * share,
        f"eval/{suite}/truncated_fraction": 0.01 * share,
        f"eval/{suite}/p_wait_after_no": 0.031 + (0.6 - 2 * shift) * share**2,
    }


def all_rows() -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = [{"step": 0, "time": 1.7e9} | evaluation(0, "held_out", 0) | evaluation(0, "fresh", 0.03)]
    for step in range(1, 201):
        row = training_row(step, rng)
        if step % 50 == 0:
            row |= evaluation(step, "held_out", 0) | evaluation(step, "fresh", 0.03)
        rows.append(row)
    return rows


WORDS = ["<eos>", "ok", "no", "wait", "hmm", "+", "1", "2", "3"]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one word per token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>")).save(
        str(folder / "tokenizer.json")
    )


def write_dump(folder: Path, step: int, groups: int = 4, seed: int = 0) -> None:
    """A step's rollouts, four responses per prompt. `wait` is rare, and only group 0 has an advantage."""
    rng = np.random.default_rng(seed + step)
    dumped, per_token = [], {"actor_log_probs": [], "entropy": [], "kept": [], "selected": []}
    for index in range(4 * groups):
        length = int(rng.integers(3, 12))
        ids = rng.choice(len(WORDS), size=length, p=[0.1, 0.15, 0.15, 0.02, 0.03, 0.25, 0.1, 0.1, 0.1]).tolist()
        log_probs = np.log(rng.uniform(0.001, 1, size=length))
        prompt = Prompt(id=f"train:{index // 4}", token_ids=(1,), text=f"problem <b>{index // 4}</b>", label=24)
        detail = "correct" if index % 2 else "wrong"
        text = " ".join(WORDS[i] for i in ids)
        dumped.append(
            DumpedResponse(
                group=index // 4,
                prompt=prompt,
                response=Response(ids, log_probs, "stop", step),
                reward=RewardResult(float(index % 2), answer="<i>12</i>", detail=detail, text=text),
                advantage=(1.0 if index % 2 else -1.0) if index < 4 else 0.0,
            )
        )
        for name, values in {
            "actor_log_probs": log_probs.astype(np.float32),
            "entropy": rng.uniform(0, 2, size=length).astype(np.float32),
            "kept": log_probs > np.log(0.02),
            "selected": log_probs < np.log(0.05),
        }.items():
            per_token[name].append(values)
    write_rollouts(folder / "rollouts", step, dumped, per_token)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


async def chatty(model: Model, prompt: Prompt) -> float:
    """Uses a calculator, and begins a second conversation with a summary of the first."""
    messages = [{"role": "system", "content": "Compute."}, {"role": "user", "content": prompt.text}]
    answer = await model.use_tools(messages, [calculator])
    await model.chat([{"role": "user", "content": f"Is this right: {answer['content']}"}])
    return 1.0


def spoken(prompt: str) -> str:
    """What the model of `chatty` answers."""
    if prompt.endswith("Is this right: It is <b>56</b>.<|im_end|>\n<|im_start|>assistant\n"):
        return "Yes, wait."
    if "<|im_start|>tool" in prompt:
        return "It is <b>56</b>."
    return 'Let me ask. <tool_call>{"name": "calculator", "arguments": {"expression": "7*8"}}</tool_call>'


def write_conversations(folder: Path, step: int) -> None:
    """A step's rollouts of `chatty`: two groups of two rollouts, each of two sequences."""
    prompts = [Prompt(f"train:{n}", (1,), f"What is 7 times 8, {n}?", "56") for n in range(2)]
    settings = AgentSettings(function="own:chatty")
    with AgentRollouts(settings, chatty, TextEngines(spoken), tokenizer(), 10_000) as rollouts:
        groups = rollouts.generate(prompts, sampling(n=2))
    dumped = []
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for place, response in enumerate(group):
            for sequence in response.sequences:
                assert isinstance(response, AgentResponse) and response.reward and response.tool_calls == 1
                own = replace(prompt, token_ids=tuple(sequence.context_of(prompt.token_ids)))
                advantage = float(place) - 0.5
                dumped.append(DumpedResponse(number, own, sequence, response.reward, advantage, rollout=place))
    write_rollouts(folder / "rollouts", step, dumped)


@pytest.fixture
def agent_run(run_folder: Path) -> Path:
    """A run whose agent holds conversations."""
    tokenizer().save_pretrained(run_folder)
    with (run_folder / "config.yaml").open("a") as config:
        config.write("rollout: {agent: {function: 'own:chatty'}}\n")
    write_conversations(run_folder, 1)
    return run_folder


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return all_rows()


@pytest.fixture
def run_folder(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """The folder of a finished run with config.yaml and metrics.jsonl."""
    folder = tmp_path / "countdown-lp_reg"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    write_rows(folder, rows)
    return folder


@pytest.fixture
def recorded_run(run_folder: Path) -> Path:
    """The same run with a tokenizer and the rollout dumps of three steps."""
    write_tokenizer(run_folder)
    config = run_folder / "config.yaml"
    config.write_text(config.read_text() + "observability: {word_classes: {retry: [wait], filler: [hmm, so]}}\n")
    for step in (1, 100, 200):
        write_dump(run_folder, step)
    return run_folder
