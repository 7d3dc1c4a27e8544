"""Loading of a data file into prompts that are ready for an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.schema import DataSettings
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt

from .rows import read_rows
from .schemas import Row, Schema, SchemaName, recognise
from .template import begins_as_tokenizer, check_template, render
from .tokenizer import Tokenizer, begin_ids, load_tokenizer, token_ids_of

Check = Callable[[Prompt], None]
LONGEST_PROMPT = 2**24
"""Most characters of a rendered prompt."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, and counts of the rows that were dropped or cut."""

    prompts: list[Prompt]
    schema: SchemaName
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped rows by reason: "too long", "duplicate"."""
    truncated: int = 0
    """Number of prompts that were cut on the left to `max_prompt_tokens`."""


def load_prompts(path: Path, *, tokenizer: Tokenizer, settings: DataSettings, check: Check | None = None) -> PromptSet:
    """Reads a .jsonl or .parquet file, recognises its schema, applies the template and tokenizes the prompts.

    Every key of `settings` applies except `train` and `shuffle`. `check` is called with every prompt that is kept, and
    raises ValueError for one that cannot be used. Raises UserError with the file, the line or row and the column of any
    row that cannot be used.
    """
    check_template(tokenizer, settings.template)
    return _Loading(path, tokenizer, settings, check).run()


def first_prompt(path: Path, *, model_folder: Path, settings: DataSettings) -> str:
    """Returns the first row as the model will see it. A tokenizer is loaded only if the template needs one.

    Raises UserError as `load_prompts` does.
    """
    tokenizer = load_tokenizer(model_folder) if settings.template.startswith("chat") else None
    if tokenizer:
        check_template(tokenizer, settings.template)
    for place, row in read_rows(path):
        try:
            prompt = recognise(list(row), label_field=settings.label_field, source=f"{path}, {place}").prompt(row)
            text = render(prompt, tokenizer=tokenizer, template=settings.template)
            check_length(text)
            return text
        except ValueError as error:
            raise UserError(f"{path}, {place}: {error}") from error
    raise UserError(f"{path}: the data set is empty")


def check_length(text: str) -> None:
    """Raises ValueError for a prompt that no model could read, before it is tokenized."""
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"column prompt: the prompt has {len(text)} characters; at most {LONGEST_PROMPT} are read")


class _Loading:
    """The state of one pass over a file."""

    def __init__(self, path: Path, tokenizer: Tokenizer, settings: DataSettings, check: Check | None) -> None:
        self.path = path
        self.check = check
        self.tokenizer = tokenizer
        self.settings = settings
        self.prompts: list[Prompt] = []
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self.seen: set[tuple[str, str]] = set()
        self.encoded: dict[str, tuple[int, ...]] = {}  # repeated prompts share one tokenization and one tuple
        self.begin: tuple[int, ...] | None = None if begins_as_tokenizer(settings.template) else ()
        """Ids that every prompt begins with; None before the first prompt."""

    def run(self) -> PromptSet:
        schema: Schema | None = None
        for index, (place, row) in enumerate(read_rows(self.path)):
            if schema is None:
                source, label_field = f"{self.path}, {place}", self.settings.label_field
                schema = recognise(list(row), label_field=label_field, source=source)
            try:
                self._add(index, row, schema)
            except ValueError as error:
                raise UserError(f"{self.path}, {place}: {error}") from error
        if schema is None:
            raise UserError(f"{self.path}: the data set is empty")
        if not self.prompts:
            raise UserError(
                f"{self.path}: all {self.dropped['too long']} prompts are longer than data.max_prompt_tokens: "
                f"{self.settings.max_prompt_tokens}; raise it, or set data.long_prompts: truncate_left"
            )
        return PromptSet(self.prompts, schema.name, dict(self.dropped), self.truncated)

    def _add(self, index: int, row: Row, schema: Schema) -> None:
        text = render(schema.prompt(row), tokenizer=self.tokenizer, template=self.settings.template)
        check_length(text)
        text.encode()  # raises ValueError for lone surrogates, which JSON allows and tokenizers do not
        label = schema.label(row)
        if self.settings.drop_duplicates:
            key = (text, repr(label))
            if key in self.seen:
                self.dropped["duplicate"] += 1
                return
            self.seen.add(key)
        if text not in self.encoded:
            self.encoded[text] = self._encode(text)
        token_ids = self.encoded[text]
        if not token_ids:
            raise ValueError("column prompt: the prompt is empty")
        limit = self.settings.max_prompt_tokens
        if len(token_ids) > limit:
            if self.settings.long_prompts == "error":
                raise ValueError(f"the prompt has {len(token_ids)} tokens; data.max_prompt_tokens is {limit}")
            if self.settings.long_prompts == "drop":
                self.dropped["too long"] += 1
                return
            self.truncated += 1
            begin = self.begin or ()
            token_ids = (begin + token_ids[len(token_ids) - limit + len(begin) :])[:limit]
            text = self.tokenizer.decode(list(token_ids))
        prompt = Prompt(f"{self.path.stem}:{index}", token_ids, text, label, schema.metadata(row))
        if self.check:
            self.check(prompt)
        self.prompts.append(prompt)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Returns the ids of a rendered text. Templates of ours begin as the tokenizer's post-processor would, unless
        the text already does."""
        if self.begin is None:
            self.begin = tuple(begin_ids(self.tokenizer, text))
        token_ids = tuple(token_ids_of(self.tokenizer, text))
        return token_ids if token_ids[: len(self.begin)] == self.begin else self.begin + token_ids
