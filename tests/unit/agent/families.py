"""Chat templates of published models, which the TRL package brings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tests.unit.agent.kit import END, PLAIN, THINKING_REMOVED

OWN_SYSTEM = "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nok<|im_end|>\\n' }}{% endif %}" + PLAIN
"""It has a system message of its own, as that of SmolLM2."""


def published(name: str) -> str:
    """The chat template of a published model, as the TRL package has it."""
    spec = find_spec("trl")
    assert spec and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / f"chat_templates/{name}.jinja").read_text()


FAMILIES = {
    "plain": (PLAIN, END),
    "thinking removed": (THINKING_REMOVED, END),
    "qwen2_5": (published("qwen2_5"), END),
    "qwen3": (published("qwen3"), END),  # it removes thinking from earlier turns
    "llama3": (published("llama3"), "<|eot_id|>"),
    "llama3_1": (published("llama3_1"), "<|eot_id|>"),
    "llama3_2": (published("llama3_2"), "<|eot_id|>"),
    "gpt-oss": (published("gptoss"), "<|return|>"),
    "smollm2": (OWN_SYSTEM, END),
}
"""Chat template and end token."""
