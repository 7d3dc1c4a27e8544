"""The base of every section, and the field types that more than one section uses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict


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
