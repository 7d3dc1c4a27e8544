"""The base of every section, and the types of keys that more than one section uses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, Strict
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from megatron_rl.utils.import_path import is_import_path


class Section(BaseModel):
    """A group of keys. Validation is strict, so that a typo or a wrong type never falls back to a default silently."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def _to_path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) and value else value


def worded(pattern: str, words: str) -> AfterValidator:
    """Validates that the complete text matches the pattern. `words` describe the expected form in the error."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


@dataclass(frozen=True)
class NameOrPath:
    """Text that is one of `names`, or an import path of the form that `form` shows."""

    names: tuple[str, ...]
    form: str

    @property
    def words(self) -> str:
        """What the key takes, for messages."""
        return f"one of {', '.join(self.names)}, or {self.form}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.names and not is_import_path(value):
            near = get_close_matches(value, self.names, n=1)
            raise ValueError(self.words + (f"; did you mean {near[0]}?" if near else ""))
        return value


FilePath = Annotated[Path, BeforeValidator(_to_path)]
"""A path, written as text in YAML and relative to the folder in which the command runs."""

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrZero = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Betas = Annotated[tuple[Decay, Decay], Strict(False)]
"""The two decay rates of Adam. Validation is not strict because YAML has lists and no tuples."""

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""A name that becomes part of a metric's name."""
