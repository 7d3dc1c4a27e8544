"""The tokenizer of a model folder, and tokens that are looked up in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_rl.config.validate import TOKENIZER_FILES
from megatron_rl.errors import UserError
from megatron_rl.models.own_code import refuse_own_code
from megatron_rl.utils.bounded import read_json_object

from .schemas import Message


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts need."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def apply_chat_template(
        self, conversation: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any: ...


def load_tokenizer(model_folder: Path) -> Any:
    """Loads the tokenizer of a Hugging Face model folder from local files. Raises UserError if it has none, or one that
    cannot be loaded or needs code of the folder's own."""
    if not any((model_folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{model_folder}: no tokenizer here; expected one of {', '.join(TOKENIZER_FILES)}")
    refuse_own_code(model_folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file, and others lack a package
        raise UserError(f"{model_folder}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error


def token_ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens beside those in the text. Raises ValueError if the tokenizer
    cannot encode the text."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises a bare Exception for a word outside the vocabulary
        raise ValueError(f"the tokenizer cannot encode the prompt: {error}") from error


def begin_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids that the tokenizer's own post-processor puts before a text: the begin token, or nothing.

    `text`: any text that the tokenizer can encode.
    """
    plain, whole = token_ids_of(tokenizer, text), tokenizer.encode(text, add_special_tokens=True)
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def single_token(tokenizer: Any, text: str, key: str) -> int:
    """Returns the id of the token that `text` consists of. Raises UserError if it is not exactly one known token.

    `key` is the configuration key that the error names.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises a bare Exception for a word outside the vocabulary
        raise UserError(f"{key}: {text!r} is not in the model's vocabulary: {error}") from error
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = f"{len(ids)} tokens: {ids}" if len(ids) != 1 else "unknown"
        raise UserError(f"{key}: {text!r} must be one token of the model's vocabulary; it is {what}")
    return int(ids[0])


def stop_token_ids(tokenizer: Any, model_folder: Path, chosen: list[int] | None) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a response.

    They are the `chosen` ones if given, otherwise the end tokens of generation_config.json, otherwise that of the
    tokenizer. Raises UserError if none of these names an end token.
    """
    if chosen is not None:
        return tuple(chosen)
    generation = model_folder / "generation_config.json"
    ends = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    if ends is None or ends == []:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise UserError(
            f"nothing ends a response: neither {generation} nor the tokenizer names an end token; "
            f"set rollout.stop_token_ids"
        )
    found = ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int and end >= 0 for end in found):
        raise UserError(f"{generation}: eos_token_id: token ids are expected, found {str(ends)[:80]}")
    return tuple(found)
