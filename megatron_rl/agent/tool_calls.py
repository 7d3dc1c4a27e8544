"""Tool calls in what a model wrote. Each family of models has a form of its own, which its chat template names.

- Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, also with the templates of the next two
- Llama 3.1: the answer is `{"name": ..., "parameters": {...}}` and nothing else
- Mistral: `[TOOL_CALLS]` and a list of `{"name": ..., "arguments": {...}}`, or, since the tokenizer's version 11,
  `[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{...}` for each call, of which version 13 leaves out the id
- gpt-oss (OpenAI's harmony format): a message with a recipient,
  `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`, after messages of other channels
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, Literal

from megatron_rl.agent.messages import MALFORMED, Message, parsed, well_formed

Form = Literal["hermes", "llama", "mistral", "harmony"]
FORMS: dict[str, Form] = {
    '{"name": function name, "parameters": dictionary': "llama",  # what it tells the model about tool calls
    "[TOOL_CALLS]": "mistral",
    "<|channel|>": "harmony",
}
"""Part of a chat template -> form of the tool calls that its model writes."""
SPELLED: tuple[Form, ...] = ("mistral", "harmony")
"""Forms that special tokens mark."""
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_LLAMA = re.compile(r'\s*{\s*"name"\s*:')
_MISTRAL = re.compile(r"\s*([^\[\]{}]*?)\s*(?:\[CALL_ID\]\s*(.*?)\s*)?\[ARGS\](.*)", re.DOTALL)
_MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
_HARMONY_END = re.compile(r"<\|(?:end|call|return)\|>")
_HARMONY_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]*)")


def form_of(template: str) -> Form:
    """Returns the form in which a model with this chat template writes tool calls."""
    return next((form for part, form in FORMS.items() if part in template), "hermes")


def answer_of(text: str, *, with_tools: bool, form: Form = "hermes", spelled: str = "") -> Message:
    """Returns the message that the model wrote.

    Tool calls are looked for only if there are tools. One that is not JSON of a call has the name MALFORMED; one of
    Hermes that is not closed stays text. `spelled`: the text with its special tokens, for the forms that need them.
    """
    if form == "harmony":
        return _harmony(text, spelled, with_tools=with_tools)
    content, calls = text, []
    if with_tools and (found := _HERMES.findall(text)):
        content, calls = _HERMES.sub("", text), [_read(call, "arguments") for call in found]
    elif with_tools and form == "llama" and _LLAMA.match(text):
        content, calls = "", [_read(text.strip(), "parameters")]
    elif with_tools and form == "mistral" and "[TOOL_CALLS]" in spelled:
        content, *parts = spelled.split("[TOOL_CALLS]")
        calls = [call for part in parts for call in _mistral(part)]
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def _mistral(part: str) -> list[Message]:
    """Returns the calls after a `[TOOL_CALLS]`."""
    if named := _MISTRAL.fullmatch(part):
        name, own_id, arguments = named.groups()
        return [_call(part, name, _value(arguments), own_id)]
    value = _value(part)
    entries = value if isinstance(value, list) and value else [value]
    return [_of_entry(part, entry, "arguments") for entry in entries]


def _harmony(text: str, spelled: str, *, with_tools: bool) -> Message:
    """The thinking before a call is the content of its message, which the template of gpt-oss shows until the model
    answers. The thinking before an answer is not shown again, and is `reasoning_content`."""
    thought: list[str] = []
    said: list[str] = []
    calls: list[Message] = []
    for part in spelled.split("<|start|>"):
        header, found, rest = part.partition("<|message|>")
        body = _HARMONY_END.split(rest)[0]
        if with_tools and found and (recipient := _HARMONY_RECIPIENT.search(header)):
            calls.append(_call(body, recipient[1], _value(body)))
        elif found:
            (thought if "<|channel|>analysis" in header else said).append(body)
    if calls:
        return {"role": "assistant", "content": "\n".join(thought + said), "tool_calls": calls}
    if not thought and not said:
        return {"role": "assistant", "content": text}
    thinking = {"reasoning_content": "\n".join(thought)} if any(thought) else {}
    return {"role": "assistant", "content": "\n".join(said)} | thinking


def _read(text: str, key: str) -> Message:
    """Returns the call of a JSON object. `key`: what the form calls the arguments."""
    return _of_entry(text, _value(text), key)


def _of_entry(text: str, entry: Any, key: str) -> Message:
    fields = entry if isinstance(entry, dict) else {}
    return _call(text, fields.get("name"), fields.get(key), fields.get("id"))


def _value(text: str) -> Any:
    """Returns the value of a JSON text; None if it is none."""
    try:
        return parsed(text)
    except ValueError:
        return None


def _call(text: str, name: Any, arguments: Any, own_id: Any = None) -> Message:
    """Returns a call, which is malformed without a name or an object of arguments. `text`: the call as it was written.
    `own_id`: what the model wrote as its id. Mistral's templates want ids of nine letters or digits."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        name, arguments = MALFORMED, text
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    kept = isinstance(own_id, str) and _MISTRAL_ID.fullmatch(own_id)
    return {
        "id": own_id if kept else uuid.uuid4().hex[:9],
        "type": "function",
        "function": {"name": well_formed(name), "arguments": well_formed(arguments)},
    }
