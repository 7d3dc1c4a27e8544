"""Chat messages, in one form. A message is a dict of the OpenAI chat format."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

MALFORMED = "malformed_tool_call"
"""Name of the function in a tool call that is not the JSON of a call. Its arguments are the text of the call."""
MOST_LEVELS = 100
"""Levels of lists and objects in the arguments of a tool call. Templates and JSON writers fail at some depth."""
_KEPT = ("role", "content", "reasoning_content", "name", "tool_call_id")


class BadRequest(Exception):
    """A request that cannot be answered. The message says why."""


def normalised(messages: Any) -> list[Message]:
    """Returns the messages with what counts, in one form: clients add null fields and split texts into parts.

    Raises BadRequest for anything that is not a list of chat messages with text.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: a list with at least one message is expected")
    return [_normalised(i, message) for i, message in enumerate(messages)]


def _normalised(index: int, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"messages.{index}: an object with a role is expected")
    found = {key: message[key] for key in _KEPT if message.get(key)}
    if wrong := [key for key in found if key != "content" and not isinstance(found[key], str)]:
        raise BadRequest(f"messages.{index}.{wrong[0]}: a text is expected")
    found["content"] = _text(index, message.get("content"))
    if calls := message.get("tool_calls"):
        try:
            found["tool_calls"] = [_call(call) for call in calls]
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise BadRequest(f"messages.{index}.tool_calls: a function with name and arguments is expected") from error
    return found


def _text(index: int, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(map(_is_text, content)):
        return "".join(part["text"] for part in content)
    raise BadRequest(
        f"messages.{index}.content: text or parts of text are expected; images and sound are not supported"
    )


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {
            "name": _str(function["name"]),
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        },
    }


def _str(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name")
    return name


def well_formed(text: str) -> str:
    """Returns the text with a question mark for each lone surrogate, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def key_of(message: Message) -> str:
    """Returns a text that is equal for messages that count as the same: white space around an answer does not count,
    because clients strip it, nor does the way in which the JSON of arguments is written."""
    content = message["content"]
    stripped = content.strip() if message["role"] == "assistant" else content
    return json.dumps(for_template(message) | {"content": stripped}, sort_keys=True)


def for_template(message: Message) -> Message:
    """Returns the message as chat templates take it, with the arguments of tool calls as objects."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _object(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _object(arguments: str) -> Any:
    try:
        return parsed(arguments)
    except ValueError:
        return arguments


def parsed(text: str) -> Any:
    """Returns the value of a JSON text. Raises ValueError if it is none, or has more than MOST_LEVELS levels."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _is_deeper(value, MOST_LEVELS):
        raise ValueError("nested too deeply")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)
