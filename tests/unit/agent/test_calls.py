"""Single calls of a model by an agent: their tokens, stop texts and limits."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from megatron_rl.agent.model import Model
from megatron_rl.agent.session import Session
from megatron_rl.types import AgentResponse, Prompt, Response
from tests.unit.agent.kit import ROOM, sampling, tokenizer
from tests.unit.agent.test_rollouts import one


def test_stop_texts_end_an_answer_at_the_token_that_completes_them() -> None:
    seen: list[str] = []

    async def agent(model: Model, prompt: Prompt) -> float:
        answer = await model.generate([5, 6], stop=["cb"])
        seen.append(answer.text)
        more = await model.generate([5, 6, *answer.response.token_ids.tolist(), 9], max_tokens=2)
        seen.append(more.response.finish_reason)
        return 1.0

    response = one(agent, lambda text: "aacbok")
    assert seen == ["aa", "length"]
    assert isinstance(response, AgentResponse) and response.others == () and response.context == (5, 6)
    assert response.sampled_mask.tolist() == [True] * 4 + [False] + [True] * 2


@pytest.mark.parametrize("tokens", [[10**6], [-1], [10**30], [1.7], ["5"], [True], [5, None], [], [[1], [2]]])
def test_what_are_no_tokens_of_the_vocabulary_is_refused_before_the_engine_sees_it(tokens: Any) -> None:
    async def agent(model: Model, prompt: Prompt) -> float:
        await model.generate(tokens)
        return 1.0

    response = one(agent)
    assert response.reward.outcome == "error" and response.num_sampled_tokens == 0
    assert response.reward.detail.startswith("ValueError")
    if tokens == [10**6]:
        assert f"token 1000000 is not in the vocabulary of {len(tokenizer())} tokens" in response.reward.detail


def test_arrays_of_tokens_and_sampled_tokens_beyond_the_tokenizer_can_be_continued() -> None:
    beyond = len(tokenizer()) + 3

    async def sample(prompt: Any, sampling: Any) -> Response:
        return Response([beyond], [-0.5], "stop", 0)  # type: ignore[arg-type]

    async def run() -> int:
        session = Session(tokenizer(), sample, sampling(), ROOM)
        await session.generate(np.array([5, 6]))
        await session.generate([5, 6, beyond])
        return session.recording.num_sampled_tokens

    assert asyncio.run(run()) == 2


def test_calls_at_the_same_time_share_the_limit_of_sampled_tokens() -> None:
    async def agent(model: Model, prompt: Prompt) -> float:
        answers = await asyncio.gather(*(model.generate([5, k]) for k in range(4)), return_exceptions=True)
        assert [type(answer).__name__ for answer in answers].count("LimitReached") == 2
        return 1.0

    response = one(agent, max_tokens=4)
    assert response.num_sampled_tokens == 4 and response.reward.score == 1.0


@pytest.mark.parametrize("stop", ["cb", ("cb",)])
def test_a_stop_text_may_be_given_alone(stop: Any) -> None:
    async def agent(model: Model, prompt: Prompt) -> float:
        assert (await model.generate([5, 6], stop=stop)).text == "aa"
        assert (await model.chat([{"role": "user", "content": "b"}], stop=stop))["content"] == "aa"
        return 1.0

    assert one(agent, lambda text: "aacbok").reward.score == 1.0


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], 3, "\ud800"])
def test_stop_texts_that_are_none_are_refused(stop: Any) -> None:
    async def agent(model: Model, prompt: Prompt) -> float:
        await model.generate([5, 6], stop=stop)
        return 1.0

    assert "BadRequest: stop:" in one(agent).reward.detail


def test_a_stop_text_that_the_tokenizer_cannot_encode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tokenizer of whole words does for a word that it does not know."""

    def encode(text: str, **_: Any) -> list[int]:
        raise Exception(f"{text} is unknown")

    async def agent(model: Model, prompt: Prompt) -> float:
        monkeypatch.setattr(model.tokenizer, "encode", encode)
        await model.generate([5, 6], stop="word")
        return 1.0

    assert "BadRequest: stop: the tokenizer cannot encode a text: word is unknown" in one(agent).reward.detail
