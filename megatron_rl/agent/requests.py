"""What a request to `chat/completions` may ask for."""

from __future__ import annotations

from typing import Any

from megatron_rl.agent.messages import BadRequest

TYPES: dict[str, tuple[Any, str]] = {
    "stream": (bool, "true or false"),
    "stream_options": (dict, "an object"),
    "logprobs": (bool, "true or false"),
    "top_logprobs": (int, "a whole number"),
    "tool_choice": (str | dict, "a text or an object"),
    "tools": (list, "a list"),
}
TOOL_CHOICES = ("none", "auto", "required")
"""`required`, or the name of a function, is taken as `auto`: the log-probs are those of the policy as it is."""
LIMITS = ("max_completion_tokens", "max_tokens")
"""OpenAI's names for the limit of an answer's tokens. The first one counts."""


def check(asked: dict[str, Any]) -> None:
    """Raises BadRequest for what the server cannot do, and for values of a wrong type. `Session.chat` checks the
    messages and stop texts."""
    for name, (kind, words) in TYPES.items():
        if not isinstance(asked.get(name), kind | None):
            raise BadRequest(f"{name}: {asked[name]!r} is not {words}")
    for name in LIMITS:
        if (count := asked.get(name)) is not None and (type(count) is not int or count < 1):
            raise BadRequest(f"{name}: {count!r} is not a whole number above 0")
    if (n := asked.get("n")) is not None and (type(n) is not int or n != 1):
        raise BadRequest(f"n: {n!r}, but a request has one answer; make several requests")
    if asked.get("top_logprobs"):
        raise BadRequest("top_logprobs: there are log-probs of the sampled tokens only")
    if isinstance(choice := asked.get("tool_choice"), str) and choice not in TOOL_CHOICES:
        raise BadRequest(f"tool_choice: {choice!r} is not one of {', '.join(TOOL_CHOICES)}")
    for i, tool in enumerate(asked.get("tools") or []):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"tools.{i}: an object of type function, and a function with a name, are expected")
