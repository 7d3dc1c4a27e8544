"""The adapter of NeMo Gym, against a small server that answers as Gym's agent and vLLM model servers do.

What they do was read from the released package. Gym itself (Python 3.13.14 and newer) is not run.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.environments.nemo_gym import _Gateway
from megatron_rl.errors import UserError
from megatron_rl.types import AgentResponse, Prompt, RewardResult
from tests.unit.agent.kit import TextEngines, sampling, tokenizer

ROW = {"responses_create_params": {"input": [{"role": "user", "content": "ab"}]}, "expected": "ok"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gym:
    """Calls the policy at its one address, and scores whether the answer is what the row expects."""

    def __init__(self) -> None:
        self.policy = free_port()
        self.key_is_lost = False

    async def run(self, request: web.Request) -> web.Response:
        row = await request.json()
        if row.get("fails"):
            return web.Response(status=500, text="no session")
        asked = row["responses_create_params"]
        messages = list(asked["input"])
        extra = {} if self.key_is_lost else json.loads(asked["metadata"]["extra_body"])
        for turn in range(row.get("turns", 1)):
            body = {"model": "policy_model", "messages": messages, "temperature": 0.3} | extra
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"http://127.0.0.1:{self.policy}/v1/chat/completions", json=body) as answer,
            ):
                if answer.status != 200:
                    return web.Response(status=500, text=await answer.text())
                message = (await answer.json())["choices"][0]["message"]
            messages += [message, {"role": "user", "content": f"turn {turn}"}]
        reward = float(message["content"] == row["expected"])
        failure = (
            {"mask_sample": True, "failure_kind": "judge", "failure_reason": "is down"} if row.get("masked") else {}
        )
        return web.json_response(row | {"response": {}, "reward": reward} | failure)


@pytest.fixture
def gym() -> Iterator[Gym]:
    loop, own = asyncio.new_event_loop(), Gym()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    app = web.Application()
    app.router.add_post("/run", own.run)
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    own.url = f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), loop).result()}"  # type: ignore[attr-defined]
    yield own
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def play(gym: Any, *rows: dict[str, Any], max_turns: int = 9) -> list[AgentResponse]:
    settings = AgentSettings(
        function=f"nemo-gym:{gym.url}?policy=127.0.0.1:{gym.policy}", timeout_seconds=30, max_turns=max_turns
    )
    prompts = [Prompt(f"p:{i}", (1,), "", None, row) for i, row in enumerate(rows)]
    engines = TextEngines(lambda text: "ok" if "ab" in text else "no")
    with AgentRollouts(settings, load_agent(settings), engines, tokenizer(), 20_000) as rollouts:
        groups = rollouts.generate(prompts, sampling(2))
    with socket.socket() as probe:  # the gateway ends with the rollouts
        assert probe.connect_ex(("127.0.0.1", gym.policy))
    found = [response for group in groups for response in group]
    assert all(isinstance(response, AgentResponse) for response in found)
    return found  # type: ignore[return-value]


def reward_of(response: AgentResponse) -> RewardResult:
    assert response.reward is not None
    return response.reward


def test_rollouts_at_the_same_time_share_one_address(gym: Gym) -> None:
    other = {"responses_create_params": {"input": [{"role": "user", "content": "cd"}]}, "expected": "ok"}
    played = play(gym, ROW, other, ROW | {"turns": 3})
    assert [reward_of(response).score for response in played] == [1, 1, 0, 0, 1, 1]
    assert [response.turns for response in played] == [1, 1, 1, 1, 3, 3]
    assert all(response.others == () for response in played)
    assert "ab" in tokenizer().decode(played[0].context) and "cd" in tokenizer().decode(played[2].context)


def test_failures_have_no_reward(gym: Gym) -> None:
    played = play(gym, ROW | {"fails": True}, ROW | {"masked": True}, {"expected": "ok"})
    assert {reward_of(response).outcome for response in played} == {"error"}
    details = [reward_of(response).detail for response in played[::2]]
    assert "answers 500: no session" in details[0] and "judge: is down" in details[1]
    assert "no column responses_create_params" in details[2]
    gym.key_is_lost = True
    assert "metadata.extra_body" in reward_of(play(gym, ROW)[0]).detail


def test_a_rollout_at_its_limit_is_truncated(gym: Gym) -> None:
    (response, _) = play(gym, ROW | {"turns": 5}, max_turns=2)
    assert response.reward is None and response.finish_reason == "length" and response.turns == 2


@pytest.mark.parametrize(
    "end", ["", "?policy=", "?policy=a", "?policy=a:0", "?policy=a:65536", "?policy=[a:1", "[?policy=a:1"]
)
def test_the_address_of_the_policy_is_needed(end: str) -> None:
    with pytest.raises(UserError, match=r"must end in \?policy=HOST:PORT"):
        load_agent(AgentSettings(function=f"nemo-gym:http://127.0.0.1:1{end}"))


def test_every_rollout_waits_until_its_gateway_listens() -> None:
    port = free_port()

    async def reached(gateway: _Gateway, key: str) -> bool:
        async with gateway.passes_on(SimpleNamespace(api_key=key)):  # type: ignore[arg-type]
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

    async def twice() -> list[Any]:
        gateway = _Gateway("127.0.0.1", port)
        return await asyncio.gather(reached(gateway, "a"), reached(gateway, "b"), return_exceptions=True)

    assert asyncio.run(twice()) == [True, True]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert [type(error) for error in asyncio.run(twice())] == [OSError, OSError]
