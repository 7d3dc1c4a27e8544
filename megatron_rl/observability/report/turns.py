"""The turns of a conversation, found in the tokens that a chat template wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

ROLES = {
    "system": "system",
    "developer": "system",
    "available_tools": "system",
    "user": "user",
    "inst": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "functions": "tool",
    "observation": "tool",
    "tool_results": "tool",
    "/inst": "assistant",
    "/tool_results": "assistant",
}
"""Words of chat templates -> roles. Mistral's templates close a message, and the answer follows."""
_NAMES = "|".join(sorted(map(re.escape, ROLES), key=len, reverse=True))
_ROLE_TOKEN = re.compile(rf"[<\[][^\w/]*({_NAMES})\W*[>\]]", re.IGNORECASE)
"""A token that names a role: `<|user|>`, `[INST]`, or DeepSeek's with its wide bars."""
_OPENING = re.compile(r"<\W*(im_start|start_header_id|start_of_turn|start_of_role|start|turn)\W*>")
"""A token that the name of a role follows: `<|im_start|>`, `<|start_header_id|>`, `<start_of_turn>`."""
_NAME = re.compile(rf"\s*({_NAMES})\b", re.IGNORECASE)
LONGEST_NAME = 12
"""Most tokens that a role's name has: one in most vocabularies, and one per letter in some."""
_TOOL_RESPONSE = re.compile(r"\W*(\w++\W*?){1,2}<tool_response>")
"""Beginning of a user's turn in which templates such as Qwen's put the results of tools. A word is taken as a whole:
otherwise the search would try each way to divide a long one in two."""


def turns_of(texts: Sequence[str], sampled: Sequence[bool]) -> list[tuple[str, int]]:
    """Returns (role, index of the first token) of each turn of a conversation; nothing if no template divides it.

    Args:
        texts: the text of each token, context included.
        sampled: True for tokens of the policy, whose text begins no turn. Turns begin where a template says so.
    """
    found = [
        (role, place)
        for place, (text, own) in enumerate(zip(texts, sampled, strict=True))
        if not own and (role := _role(text, texts[place + 1 : place + 1 + LONGEST_NAME]))
    ]
    if not found:
        return []
    found[0] = (found[0][0], 0)  # a begin token may come before the first turn
    ends = [place for _, place in found[1:]] + [len(texts)]
    return [
        ("tool" if role == "user" and _TOOL_RESPONSE.match("".join(texts[place:end])) else role, place)
        for (role, place), end in zip(found, ends, strict=True)
    ]


def _role(text: str, following: Sequence[str]) -> str | None:
    if match := _ROLE_TOKEN.fullmatch(text.strip()):
        return ROLES[match[1].lower()]
    if _OPENING.fullmatch(text.strip()) and (match := _NAME.match("".join(following))):
        return ROLES[match[1].lower()]
    return None
