"""The sections of the configuration that hold the settings of methods, built from `lpreg/losses/<name>.py`.

Each method of lpreg has a section `algorithm.<name>`, whose keys are its settings. None is written as "none", because
null clears a key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lpreg import PolicyLoss
from lpreg.losses.lp_reg_term import LpRegTermSettings
from lpreg.losses.registry import METHODS
from lpreg.losses.settings import Range, Setting, settings_of

from .fields import Section

BESIDE = ("proxy_source",)
"""Settings of a method that are keys of `algorithm` itself."""


class MethodSection(Section):
    """The settings of one method. Those of a method that is not the configured one may be unset."""

    # The classes below have no source of their own, in which pydantic would look for docstrings at some cost.
    model_config = ConfigDict(use_attribute_docstrings=False)

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


def _annotation(setting: Setting) -> Any:
    """The type of the setting's key; unset is None."""
    kind = setting.kind
    if setting.range:
        kind = Annotated[kind, Field(**dict(_bounds(setting.range)))]
    return kind | Literal["none"] | None if setting.optional else kind | None


def _bounds(limits: Range) -> Iterator[tuple[str, Any]]:
    for name, bound in (("gt" if limits.open_low else "ge", limits.low), ("le", limits.high)):
        if math.isfinite(bound):
            yield name, int(bound) if bound == int(bound) else bound  # messages show whole numbers without a point


def _section(method: type[PolicyLoss]) -> type[MethodSection]:
    fields: dict[str, Any] = {
        setting.name: (_annotation(setting), Field(default=None, description=setting.doc))
        for setting in settings_of(method.Settings)
        if setting.name not in BESIDE
    }
    return create_model(method.Settings.__name__, __base__=MethodSection, __module__=__name__, **fields)


class _TermSection(Section):
    """The settings of Lp-Reg's term on another method."""

    model_config = ConfigDict(use_attribute_docstrings=False)

    @property
    def replaced(self) -> dict[str, str]:
        """Settings that another given one replaces: name -> the setting that replaces it."""
        return LpRegTermSettings.replaced(_without_none(self.__dict__))

    @model_serializer(mode="wrap")
    def _without_replaced(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out the default of a setting that another one replaces."""
        left_out = self.replaced.keys() - self.model_fields_set
        return {name: value for name, value in handler(self).items() if name not in left_out}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None in place of "none"."""
    return {name: None if value == "none" else value for name, value in values.items()}


def _term_section() -> type[_TermSection]:
    fields: dict[str, Any] = {}
    for setting in settings_of(LpRegTermSettings):
        kind = setting.kind if setting.range is None else Annotated[setting.kind, Field(**dict(_bounds(setting.range)))]
        default = "none" if setting.default is None else setting.default
        annotation = kind | Literal["none"] if setting.optional else kind
        if setting.name not in BESIDE:
            fields[setting.name] = (annotation, Field(default=default, description=setting.doc))
    return create_model("LpRegTermSection", __base__=_TermSection, __module__=__name__, **fields)


TERM_SECTION = _term_section()
"""The settings of Lp-Reg's term on another method, each with its default."""

SECTIONS = {name: _section(method) for name, method in METHODS.items()}
globals().update(
    {section.__name__: section for section in (*SECTIONS.values(), TERM_SECTION)}
)  # pickle finds a class by its name


def effective_values(method: type[PolicyLoss], preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the method as YAML has it: the given value, otherwise the preset's, otherwise the default.

    Settings that another given one replaces are left out unless they are given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    from_preset = method.presets.get(preset, {}) if preset is not None else {}
    values: dict[str, Any] = {}
    for setting in settings_of(method.Settings):
        if setting.name in BESIDE:
            continue
        value = given.get(setting.name, from_preset.get(setting.name, setting.default))
        if value is not dataclasses.MISSING:
            values[setting.name] = "none" if value is None and setting.optional else value
    replaced = method.Settings.replaced(plain_values(method, given))
    return {name: value for name, value in values.items() if name in given or name not in replaced} | {
        name: value for name, value in given.items() if name not in values
    }


def term_settings(section: Section, **beside: Any) -> LpRegTermSettings:
    """Returns the settings of Lp-Reg's term. Raises ValueError for settings that do not go together."""
    return LpRegTermSettings(**_without_none(section.model_dump()), **beside)


def plain_values(method: type[PolicyLoss], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the method takes them: "none" is None if None is a value of the setting."""
    optional = {setting.name for setting in settings_of(method.Settings) if setting.optional}
    return {name: None if value == "none" and name in optional else value for name, value in values.items()}
