"""OpenEnv: the released client and a server of the released package, over WebSockets on this machine.

The package is installed without its dependencies, because it and verifiers want different versions of mcp. Only its
support of MCP environments needs fastmcp, for which empty modules stand here.
"""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.types import AgentResponse, Prompt
from tests.unit.agent.kit import TextEngines, sampling, tokenizer

uvicorn = pytest.importorskip("uvicorn")


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in ("fastmcp", "fastmcp.client", "fastmcp.client.client"):
    sys.modules.setdefault(_name, _Empty(_name))
pytest.importorskip("openenv.core")

from openenv.core.env_server import create_fastapi_app  # noqa: E402
from openenv.core.env_server.interfaces import Environment  # noqa: E402
from openenv.core.env_server.types import Action, Observation, State  # noqa: E402

pytestmark = pytest.mark.environments


class Word(Action):
    word: str


class Move(Action):
    x: int
    y: int


class Seen(Observation):
    text: str = ""


class Echo(Environment[Action, Seen, State]):
    """Gives 0.5 for each answer with the letter of its reset, and ends after two; it fails for `fail`."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, letter: str = "a", **rest: Any) -> Seen:
        self.letter, self.steps = letter, 0
        return Seen(text=f"say {letter}")

    def step(self, action: Any, timeout_s: float | None = None, **rest: Any) -> Seen:
        said = action.word if isinstance(action, Word) else self.letter * action.x
        if said == "fail":
            raise RuntimeError("the environment is gone")
        self.steps += 1
        reward = None if said == "silent" else 0.5 * (self.letter in said)
        return Seen(text=f"heard {said}", reward=reward, done=self.steps == 2)

    @property
    def state(self) -> State:
        return State(step_count=self.steps)


@contextmanager
def serving(kind: type[Action]) -> Iterator[str]:
    """Serves the environment with actions of this class, and gives its URL."""
    app = create_fastapi_app(Echo, kind, Seen, max_concurrent_envs=8)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


def play(url: str, answers: Callable[[str], str], *, max_turns: int = 9, **reset: Any) -> AgentResponse:
    settings = AgentSettings(function=f"openenv:{url}", timeout_seconds=30, max_turns=max_turns)
    prompt = Prompt("p", (1,), "A game.", None, {"reset": reset} if reset else {})
    with AgentRollouts(settings, load_agent(settings), TextEngines(answers), tokenizer(), 20_000) as rollouts:
        ((response,),) = rollouts.generate([prompt], sampling())
    assert isinstance(response, AgentResponse) and response.reward is not None
    return response


@pytest.mark.parametrize(
    ("kind", "said", "heard"), [(Word, "bob", "bob"), (Move, '{"x": 2, "y": 0}', "bb")], ids=["one text", "JSON"]
)
def test_answers_are_actions_until_the_environment_is_done(kind: type[Action], said: str, heard: str) -> None:
    with serving(kind) as url:
        response = play(url, lambda text: said, letter="b", seed=3)
    assert response.reward and response.reward.score == 1.0 and response.turns == 2 and response.others == ()
    seen = tokenizer().decode([*response.context, *response.token_ids])
    assert "A game.\n\nsay b" in seen and f"heard {heard}" in seen


def test_an_action_of_the_wrong_form_is_seen_by_the_policy() -> None:
    answers = ["left", "[1]", '{"x": "far"}', '{"x": 1, "y": 0}', '{"x": 1, "y": 0}']
    with serving(Move) as url:
        response = play(url, lambda text: answers[text.count("<|im_start|>assistant") - 1])
    assert response.reward and response.reward.score == 1.0 and response.turns == 5


def test_failures_have_no_reward_and_a_limit_keeps_what_was_earned() -> None:
    with serving(Word) as url:
        failed, silent = (play(url, lambda text, said=said: said).reward for said in ("fail", "silent"))
        cut = play(url, lambda text: "a", max_turns=1).reward
    gone = play(url, lambda text: "a").reward  # the server has ended
    assert failed and failed.outcome == "error" and "the environment is gone" in failed.detail
    assert silent and silent.outcome == "error" and "gave no reward" in silent.detail
    assert cut and (cut.outcome, cut.score) == ("score", 0.5)
    assert gone and gone.outcome == "error" and "127.0.0.1" in gone.detail
