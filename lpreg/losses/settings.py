"""The base of every method's settings: documented fields with ranges, checked without torch.

A setting is a field of a frozen dataclass with an annotation such as `Share`, `bool` or a Literal, a default, and a
docstring. Trainers read all three (`settings_of`), so a method's settings are stated nowhere else.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lpreg.needs import MethodNeeds


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number. `high` is included; `low` is included unless `open_low`."""

    low: float
    high: float = math.inf
    open_low: bool = False


NonNegative = Annotated[float, Range(0.0)]
Positive = Annotated[float, Range(0.0, open_low=True)]
PositiveInt = Annotated[int, Range(1)]
Share = Annotated[float, Range(0.0, 1.0, open_low=True)]
ShareOrZero = Annotated[float, Range(0.0, 1.0)]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a method, as a trainer or a page needs it."""

    name: str
    kind: Any
    """float, int, bool, str, or a Literal. The values of any other type are not checked."""
    range: Range | None
    optional: bool
    """Whether None is a value of the setting, with a meaning of its own: the annotation or the default says so."""
    default: Any
    """dataclasses.MISSING if the setting must be given."""
    doc: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """Settings of a method. Every value is checked against its annotation.

    Raises:
        ValueError: a value that makes no sense. The message begins with the name of the setting.
    """

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            _check(setting, getattr(self, setting.name))

    @property
    def needs(self) -> MethodNeeds:
        """What the method needs with these settings; the default is a sum over tokens that needs log-probs only."""
        return MethodNeeds()

    @classmethod
    def replaced(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Settings that are not read if the settings in `given` are set: name -> the setting that replaces it."""
        return {}


def settings_of(cls: Any) -> tuple[Setting, ...]:
    """The settings that a dataclass states, in order."""
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> tuple[Setting, ...]:
    hints, docs = get_type_hints(cls, include_extras=True), _docs_of(cls)
    return tuple(_setting(item, hints[item.name], docs.get(item.name, "")) for item in fields(cls))


def _setting(item: Field[Any], annotation: Any, doc: str) -> Setting:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    kind, bounds, optional = _parts(annotation)
    return Setting(item.name, kind, bounds, optional or default is None, default, doc)


def _parts(annotation: Any) -> tuple[Any, Range | None, bool]:
    """(kind, range, whether None is allowed) of an annotation."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        if len(members) != 1 or len(members) == len(get_args(annotation)):
            raise TypeError(f"a setting is of one type, or of one type and None, not {annotation}")
        kind, bounds, _ = _parts(members[0])
        return kind, bounds, True
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        return kind, next((item for item in metadata if isinstance(item, Range)), None), False
    return annotation, None, False


def _docs_of(cls: type[Any]) -> dict[str, str]:
    """Docstrings of the fields, those of base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # built in, or typed at a prompt
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = text.value if isinstance(text, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    docs[field.target.id] = inspect.cleandoc(value.value)
    return docs


def _check(setting: Setting, value: Any) -> None:
    if value is None and setting.optional:
        return
    if get_origin(setting.kind) is Literal:
        check_choice(setting.name, value, get_args(setting.kind))
    elif setting.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{setting.name} must be True or False, got {value!r}")
    elif setting.kind in (int, float):
        bounds = setting.range or Range(-math.inf)
        check_range(setting.name, value, bounds.low, bounds.high, open_low=bounds.open_low)
        if setting.kind is int and not isinstance(value, int):
            raise ValueError(f"{setting.name} must be a whole number, got {value!r}")
    elif setting.kind is str and not isinstance(value, str):
        raise ValueError(f"{setting.name} must be text, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_range(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high], or in (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
        end = ")" if high == math.inf else "]"
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low:g}, {high:g}{end}, got {value}")


def same_presets(**settings: Any) -> dict[str, dict[str, Any]]:
    """Presets of a method that the paper (arXiv 2510.03222) and its published scripts run alike."""
    return {"paper": settings, "reference": settings}
