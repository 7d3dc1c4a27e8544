"""From a row's prompt to the text that the model sees, and the tokenizer that does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_rl.config.validate import TOKENIZER_FILES
from megatron_rl.errors import UserError

from .schemas import Message

Template = Literal["none", "chat"]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def apply_chat_template(
        self, conversation: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any: ...


def load_tokenizer(model_folder: Path) -> Any:
    """The tokenizer of a Hugging Face model folder, from local files only. Raises UserError if it has none."""
    if not any((model_folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{model_folder}: no tokenizer here; expected one of {', '.join(TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model_folder}: the tokenizer cannot be loaded: {error}") from error


def check_template(tokenizer: Tokenizer, template: Template) -> None:
    """Raises UserError if the template needs what the tokenizer lacks."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "data.template: chat is set, but the tokenizer has no chat template; "
            "use data.template: none or a model folder with a chat template"
        )


def render(prompt: str | list[Message], *, tokenizer: Tokenizer, template: Template) -> str:
    """The prompt's text, special tokens included where the template has them.

    none: a string as it is; messages joined by newlines, their roles dropped. chat: the tokenizer's chat template up to
    where the assistant begins; a string is one user message. Raises ValueError if the template refuses the messages.
    """
    if template == "none":
        return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"column prompt: the chat template refuses these messages: {error}") from error
    return str(text)
