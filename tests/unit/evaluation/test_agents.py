"""`megatron-rl eval` with an agent, and with a model that cannot take the prompts or whose generation fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.agent.model import Model
from megatron_rl.cli import main
from megatron_rl.config.evaluation import ProtocolSettings
from megatron_rl.data.countdown.model import CALCULATOR, VOCABULARY, write_model
from megatron_rl.errors import UserError
from megatron_rl.evaluation.agents import AgentSource
from megatron_rl.evaluation.evaluate import Evaluation
from megatron_rl.evaluation.problems import read_problems
from megatron_rl.evaluation.sources import ModelFolder
from megatron_rl.types import Prompt, Response, Sample, SamplingParams
from tests.unit.evaluation.completion_server import Server
from tests.unit.evaluation.conftest import ScriptedSource

PROBLEMS = 6
SUITES = {
    "samples_per_prompt": 4,
    "temperature": 1.0,
    "max_prompt_tokens": 8,
    "max_response_tokens": 20,
    "reward": {"name": "countdown", "workers": 1, "max_failed_fraction": 0.9},
    "agent": {"function": "tests.unit.evaluation.test_agents:sometimes"},
    "suites": {"held_out": "problems.jsonl"},
}


async def sometimes(model: Model, prompt: Prompt) -> float | None:
    """Calls a tool that fails, and fails itself if the policy begins with an even token."""
    answer = await model.generate(prompt.token_ids, max_tokens=3)
    assert (await model.use_tool(int, x="a number")).startswith("error: ")
    if answer.response.token_ids[0] % 2 == 0:
        raise RuntimeError("the environment is gone")
    await model.generate([*prompt.token_ids, *answer.response.token_ids, VOCABULARY.index("8")])
    return None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", 0, (*VOCABULARY, CALCULATOR))
    rows = [{"prompt": f"<bos> 3 5 {n} > 22 :", "label": f"3 5 {n} > 22"} for n in range(1, PROBLEMS + 1)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model"


def evaluated(folder: Path, **changes: Any) -> Evaluation:
    protocol = ProtocolSettings.model_validate(SUITES | changes)
    source = AgentSource(ModelFolder(folder, name="mine", device="cpu"), protocol)
    evaluation = Evaluation(protocol, source, Path("out"), seed=0, batch=4)
    evaluation.run(lambda progress: None)
    return evaluation


def test_rollouts_that_fail_are_counted_and_have_no_score(folder: Path) -> None:
    evaluated(folder)
    responses = [response for problem in read_problems(Path("out/held_out.parquet")) for response in problem.responses]
    assert len(responses) == PROBLEMS * 4
    failed = [response for response in responses if not response.has_score]
    assert 0 < len(failed) < len(responses) and {response.outcome for response in failed} == {"error"}
    assert all("RuntimeError: the environment is gone" in response.detail for response in failed)
    assert all(response.tokens <= 20 for response in responses)
    summary = json.loads(Path("out/summary.json").read_text())["suites"]["held_out"]
    assert summary["failed_fraction"] == len(failed) / len(responses)
    assert {"avg@4", "pass@4"} <= set(summary)


def test_too_many_failed_rollouts_end_the_evaluation(folder: Path) -> None:
    with pytest.raises(UserError, match=r"could not be graded(.*\n)*.*the environment is gone"):
        evaluated(folder, reward=SUITES["reward"] | {"max_failed_fraction": 0.01})  # type: ignore[operator]


def test_the_command_takes_the_agent_from_the_suite_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("suites.yaml").write_text(json.dumps(SUITES))
    assert main(["eval", str(folder), "--suites", "suites.yaml", "--device", "cpu"]) == 0
    assert "not graded" in capsys.readouterr().out
    Path("suites.yaml").write_text(json.dumps(SUITES | {"agent": {"function": "nowhere:solve"}}))
    assert main(["eval", str(folder), "--suites", "suites.yaml", "--out", "other"]) == 2
    assert "nowhere" in capsys.readouterr().err and not Path("other").exists()
    Path("suites.yaml").write_text(json.dumps(SUITES | {"agent": None, "reward": {"name": "agent"}}))
    assert main(["eval", str(folder), "--suites", "suites.yaml", "--out", "other"]) == 2
    assert "there is no section agent" in capsys.readouterr().err


def tokens(body: dict[str, Any], **changes: Any) -> tuple[int, Any]:
    """Answers with token ids, as SGLang and vLLM do: three times the last word of the prompt."""
    ids = [body["prompt"][-1]] * min(3, body["max_tokens"])
    choice = {"text": "ignored", "finish_reason": "length", "token_ids": ids} | changes
    return 200, {"choices": [choice], "usage": {"completion_tokens": len(ids)}}


async def repeats(model: Model, prompt: Prompt) -> float:
    first = await model.generate(prompt.token_ids, max_tokens=3)
    seen = [*prompt.token_ids, *first.response.token_ids.tolist(), VOCABULARY.index("8")]
    second = await model.generate(seen)
    return float(second.text == "8 8 8")


def test_a_server_is_evaluated_with_an_agent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = {"function": "tests.unit.evaluation.test_agents:repeats"}
    Path("suites.yaml").write_text(json.dumps(SUITES | {"agent": agent, "reward": {"name": "agent"}}))
    command = ["--suites", "suites.yaml", "--out"]
    with Server(tokens) as server:
        assert main(["eval", server.url, *command, "out", "--tokenizer", str(folder)]) == 0
        assert len(server.requests) == 2 * PROBLEMS * 4 and all(body["return_token_ids"] for body in server.requests)
        assert len({body["seed"] for body in server.requests}) == len(server.requests)
        longer = [body["prompt"] for body in server.requests if len(body["prompt"]) > 8]
        assert len(longer) == PROBLEMS * 4 and all(ids[-4:-1] == [ids[-5]] * 3 for ids in longer)
        summary = json.loads(Path("out/summary.json").read_text())["suites"]["held_out"]
        assert summary["avg@4"]["value"] == 1.0
        assert main(["eval", server.url, *command, "other"]) == 2
        assert "--tokenizer" in capsys.readouterr().err
    with Server(partial(tokens, token_ids=None)) as server:
        assert main(["eval", server.url, *command, "third", "--tokenizer", str(folder)]) == 2
        assert "return_token_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_response_tokens": 58}, "made for 64 positions. Lower max_response_tokens or max_prompt_tokens"),
        ({"max_prompt_tokens": 7, "max_response_tokens": 57}, ""),
    ],
)
def test_prompts_that_the_model_cannot_take_are_refused(folder: Path, changes: dict[str, int], words: str) -> None:
    protocol = ProtocolSettings.model_validate(SUITES | changes)

    def opened(**options: Any) -> Evaluation:
        return Evaluation(protocol, ModelFolder(folder, name="mine", **options), Path("out"), seed=0, batch=4)

    if words:
        with pytest.raises(UserError, match=words):
            opened()
        assert not Path("out").exists()
        opened(max_positions=65)
    else:
        opened()


def test_a_token_that_the_model_lacks_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    protocol = ProtocolSettings.model_validate(SUITES)
    with pytest.raises(UserError, match=r"problems.jsonl, line 1: .*but the model has 20 token ids"):
        Evaluation(protocol, ModelFolder(folder, name="mine"), Path("out"), seed=0, batch=4)


class Fails(ScriptedSource):
    """The first response of every problem has no tokens, and the second a log-prob that is not a number."""

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        samples = super().sample(prompts, sampling)
        for place in range(0, len(samples), sampling.n):
            empty, broken = samples[place : place + 2]
            samples[place] = Sample(empty.prompt, Response([], [], "stop", 0), empty.text)  # type: ignore[arg-type]
            samples[place + 1] = Sample(
                broken.prompt,
                Response([7], [float("nan")], "stop", 0),  # type: ignore[arg-type]
                broken.text,
            )
        return samples


def test_a_failed_generation_has_no_score(protocol: ProtocolSettings, tmp_path: Path) -> None:
    reward = protocol.reward.model_copy(update={"max_failed_fraction": 1.0})
    Evaluation(
        protocol.model_copy(update={"reward": reward}), Fails(), tmp_path / "out", seed=0, batch=3
    ).run(lambda progress: None)  # fmt: skip
    for problem in read_problems(tmp_path / "out/four.parquet"):
        assert [response.outcome for response in problem.responses] == ["error", "error", "score", "score"]
        assert problem.responses[1].detail.endswith("log-prob of token 7 is not a number")
