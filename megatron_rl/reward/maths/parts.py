"""The parts of an answer: the kinds of things that an answer can be, before any algebra."""

from __future__ import annotations

from dataclasses import dataclass, field

from .notations import Based, Clock
from .numbers import Number
from .units import Unit


@dataclass(frozen=True)
class Words:
    """Words in lower case."""

    text: str


@dataclass(frozen=True)
class Expression:
    """Anything that only algebra can read, as normalised LaTeX."""

    latex: str


@dataclass(frozen=True)
class Quantity:
    """A value with its unit."""

    value: Part
    unit: Unit


@dataclass(frozen=True)
class Ratio:
    """The terms of a ratio."""

    terms: tuple[Part, ...]


@dataclass(frozen=True)
class Bracket:
    r"""Items in brackets: a tuple or an interval `(1,2]`, a set `\{1,2\}`, or a list without brackets."""

    left: str
    right: str
    items: tuple[Part, ...]
    joint: str = field(default=",", compare=False)
    r"""What stands between the items of a list: a comma, `and`, `or`, `\land` or `\lor`."""

    @property
    def is_either(self) -> bool:
        """Whether one of the items suffices."""
        return self.joint in ("or", r"\lor")


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Chain:
    """Sides and the relations between them: `x=5`, `1<x<3`."""

    sides: tuple[Part, ...]
    signs: tuple[str, ...]
    texts: tuple[str, ...]
    """The sides as normalised LaTeX."""


@dataclass(frozen=True)
class Operation:
    r"""A union (`\cup`), an intersection (`\cap`) or a difference (`\setminus`) of sets."""

    sign: str
    left: Part
    right: Part


@dataclass(frozen=True)
class Builder:
    r"""A set by a condition: `\{x \in \mathbb{Z} \mid x > 3\}`."""

    head: str
    domain: Part | None
    conditions: Part


@dataclass(frozen=True)
class NamedSet:
    r"""One of the sets R, Z, Q, N, C, as in `\mathbb{R}`."""

    name: str


@dataclass(frozen=True)
class Guarded:
    """A part with a condition in words, such as `for all real t`."""

    part: Part
    condition: str


@dataclass(frozen=True)
class Unreadable:
    """Text without a meaning, such as numbers side by side."""

    text: str


Part = (
    Words | Number | Expression | Quantity | Clock | Based | Ratio | Bracket | Matrix | Chain | Operation | Builder
    | NamedSet | Guarded | Unreadable
)  # fmt: skip
EMPTY_SET = Bracket(r"\{", r"\}", ())
