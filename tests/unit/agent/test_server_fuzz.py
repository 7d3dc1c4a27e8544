"""Fuzzing of the requests that the recording server takes: each has an answer, or an error that says what is wrong.

The number of examples is the profile's, and an example is ten requests to one session.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.agent.model import Model
from tests.unit.agent.test_server import CALL, TOOLS, USER, during, post
from tests.unit.test_fuzz_parsers import changed

GOOD: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "ab"},
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "a"}]},
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "stop": ["c"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 0,
    "temperature": 1.0,
    "n": 1,
    "max_tokens": 4,
    "max_completion_tokens": 4,
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_request_has_an_answer_or_an_error(data: st.DataObject) -> None:
    asked = [changed(GOOD, data) for _ in range(10)]

    async def check(model: Model) -> None:
        for body in asked:
            status, answer = await post(model, **body)
            assert status in (200, 400), (body, status, answer)
            if status == 400:
                answer = json.loads(answer) if isinstance(answer, str) else answer
                assert answer["error"]["message"], body

    during(check, answer=CALL)
