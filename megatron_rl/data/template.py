"""Prompt templates: the text that the model sees for the prompt of a row."""

from __future__ import annotations

from megatron_rl.config.evaluation import Template
from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import OverBudget, budget

from .schemas import Message
from .tokenizer import Tokenizer

TEMPLATE_SECONDS, TEMPLATE_MEBIBYTES = 10.0, 1024
"""Processor time and memory that rendering one prompt may take: a template is a program."""
BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
"""The request of Qwen's maths models and of most evaluations of this kind."""
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {problem} Give the final answer within "
    "\\boxed{{}}. Assistant:"
)
"""Table 1 of DeepSeek-R1 (arXiv 2501.12948), with a sentence about the box, because the verifier reads the box."""

ZERO = f"User: {BOXED}\nAssistant: Let me solve this step by step.\n<think>"
"""The end of the prompts in the scripts of the Lp-Reg paper, whose own request for the box is not known."""


def begins_as_tokenizer(template: Template) -> bool:
    """Whether prompts begin with what the tokenizer itself puts before a text. A chat template has its own beginning,
    and so has a prompt without a template."""
    return template != "none" and not template.startswith("chat")


def check_template(tokenizer: Tokenizer, template: Template) -> None:
    """Raises UserError if the template needs a chat template and the tokenizer has none, or several without a default
    one."""
    if not template.startswith("chat"):
        return
    chat = tokenizer.chat_template
    if not chat or (isinstance(chat, dict) and "default" not in chat):
        has = f"only named chat templates ({', '.join(chat)}) and none is the default" if chat else "no chat template"
        raise UserError(
            f"data.template: {template} is set, but the tokenizer has {has}; "
            "use another data.template or a model folder with a chat template"
        )


def render(prompt: str | list[Message], *, tokenizer: Tokenizer | None, template: Template) -> str:
    """Returns the prompt's text, including any special tokens of the template.

    A string counts as one user message. The templates other than `chat` and `chat-boxed` join messages with newlines,
    drop their roles and need no tokenizer. Chat templates end where the assistant's turn begins, and `chat-boxed` adds
    its request to the last message. Raises ValueError if the chat template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer and template.startswith("chat"):
        if template == "chat-boxed":
            *before, last = messages
            messages = [*before, last | {"content": BOXED.format(problem=last["content"])}]
        return _chat(messages, tokenizer)
    text = "\n".join(message["content"] for message in messages)
    wrapping = {"boxed": BOXED, "r1-zero": R1_ZERO, "zero": ZERO}.get(template, "{problem}")
    return wrapping.format(problem=text)


def _chat(messages: list[Message], tokenizer: Tokenizer) -> str:
    try:
        with budget("the chat template", seconds=TEMPLATE_SECONDS, mebibytes=TEMPLATE_MEBIBYTES):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except OverBudget as error:
        raise ValueError(f"column prompt: {error} for these messages; use another model folder or template") from error
    except Exception as error:  # a template is a program, and may raise whatever Python raises
        raise ValueError(
            f"column prompt: the chat template refuses these messages: {type(error).__name__}: {error}"
        ) from error
    return str(text)
