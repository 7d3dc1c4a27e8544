"""Chat templates of published models, which the TRL package brings, and some like them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tests.unit.agent.kit import END, PLAIN, THINKING_REMOVED

OWN_SYSTEM = "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nok<|im_end|>\\n' }}{% endif %}" + PLAIN
"""It has a system message of its own, as that of SmolLM2."""

MISTRAL = """\
{{- '<|begin_of_text|>' }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}CALLS{{ '</s>' }}
{%- elif message.role == 'assistant' %}{{ message.content + '</s>' }}
{%- else %}
{%- if tools and message == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- endif %}
{%- endfor %}"""
"""As the templates of Mistral, with the calls in the form of one of them."""
EACH_CALL = "{%- for call in message.tool_calls %}{{ '[TOOL_CALLS]' + call.function.name + OWN_ID + '[ARGS]' }}"
EACH_CALL += "{{- call.function.arguments | tojson }}{% endfor %}"
MISTRAL_CALLS = {
    "mistral": "{{ '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) }}",
    "mistral_v11": EACH_CALL.replace("OWN_ID", "'[CALL_ID]' + call.id"),
    "mistral_v13": EACH_CALL.replace("OWN_ID", "''"),
}


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
    **{version: (MISTRAL.replace("CALLS{{", calls + "{{"), "</s>") for version, calls in MISTRAL_CALLS.items()},
}
"""Chat template and end token."""
