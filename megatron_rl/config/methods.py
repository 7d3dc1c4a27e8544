"""The settings of the configured method, from what lpreg states about it (`lpreg/losses/<name>.py`).

Each method of lpreg has a section `algorithm.<name>`, whose keys are its settings. A user's own method is named by its
import path and takes its settings from `algorithm.settings`. Settings that are not given have the value of
`algorithm.preset`, otherwise the method's default. None is written as "none", since null clears a key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lpreg import MethodNeeds, MethodSettings, PolicyLoss
from lpreg.losses.corrected import CorrectionSettings
from lpreg.losses.reference_kl import ReferenceKLSettings
from lpreg.losses.registry import METHODS, unknown
from lpreg.losses.settings import Range, Setting, settings_of
from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import import_object, is_import_path

from .fields import Section

if TYPE_CHECKING:
    from .algorithm import AlgorithmSettings

BESIDE = ("proxy_source",)
"""Settings of a method that are keys of `algorithm` itself."""


class MethodSection(Section):
    """The settings of one method. Those of a method that is not the configured one may be unset."""

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


SECTIONS = {name: _section(method) for name, method in METHODS.items()}
globals().update({section.__name__: section for section in SECTIONS.values()})  # pickle finds a class by its name


def method_class(name: str) -> type[PolicyLoss]:
    """Returns the class of a method of lpreg, or of a user's own from its import path.

    Raises UserError for an unknown name and an import path that leads to no policy loss.
    """
    if name in METHODS:
        return METHODS[name]
    if not is_import_path(name):
        raise UserError(f"algorithm.name: {unknown('method', name, METHODS)}, or package.module:Class")
    method = import_object(name, "algorithm.name")
    if not (isinstance(method, type) and issubclass(method, PolicyLoss)):
        raise UserError(f"algorithm.name={name!r}: a subclass of lpreg.PolicyLoss is expected, not {method!r}")
    settings = getattr(method, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, MethodSettings) and dataclasses.is_dataclass(settings)):
        raise UserError(
            f"algorithm.name={name!r}: {method.__name__}.Settings must be a dataclass with the base "
            "lpreg.MethodSettings, the settings of the method"
        )
    return method


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
            values[setting.name] = "none" if value is None else value
    replaced = method.Settings.replaced(_plain(method, given))
    return {name: value for name, value in values.items() if name in given or name not in replaced} | {
        name: value for name, value in given.items() if name not in values
    }


def _plain(method: type[PolicyLoss], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the method takes them: "none" is None if None is a value of the setting."""
    optional = {setting.name for setting in settings_of(method.Settings) if setting.optional}
    return {name: None if value == "none" and name in optional else value for name, value in values.items()}


def section_key(algorithm: AlgorithmSettings) -> str:
    """The key below `algorithm` that holds the settings of the configured method."""
    return algorithm.name if algorithm.name in METHODS else "settings"


def given_settings(algorithm: AlgorithmSettings) -> dict[str, Any]:
    """The section of the configured method, without what is unset."""
    section = getattr(algorithm, section_key(algorithm))
    if isinstance(section, MethodSection):
        section = section.model_dump()
    return {name: value for name, value in (section or {}).items() if value is not None}


def method_settings(algorithm: AlgorithmSettings) -> MethodSettings:
    """Returns the effective settings of the configured method. Imports a user's own method.

    Raises UserError for settings that are unknown, missing, out of range or do not go together.
    """
    problems = list(_problems(algorithm))
    if problems:
        raise UserError("\n".join(text for _, text in problems))
    return _made(algorithm)


def method_problems(algorithm: AlgorithmSettings) -> list[tuple[tuple[str, ...], str]]:
    """What is wrong with the settings of the configured method: (key, sentence). A user's own method is not
    imported."""
    if algorithm.name in METHODS:
        return list(_problems(algorithm))
    return []


def method_needs(algorithm: AlgorithmSettings) -> MethodNeeds:
    """Returns what the configured method needs, its reference model and its correction included.

    Needs no torch, except that a user's own method is imported. Raises UserError as `method_settings` does.
    """
    needs = method_settings(algorithm).needs
    if algorithm.reference_kl.active:
        needs = ReferenceKLSettings(**algorithm.reference_kl.model_dump(exclude={"model"})).around(needs)
    if algorithm.correction.active:
        needs = CorrectionSettings(**algorithm.correction.model_dump()).around(needs)
    return needs


def _made(algorithm: AlgorithmSettings) -> MethodSettings:
    """Raises ValueError for settings that do not go together."""
    method = method_class(algorithm.name)
    values = effective_values(method, algorithm.preset, given_settings(algorithm))
    known = {setting.name for setting in settings_of(method.Settings)}
    beside = {name: getattr(algorithm, name) for name in BESIDE if name in known}
    settings: MethodSettings = method.Settings(**_plain(method, values), **beside)
    return settings


def _problems(algorithm: AlgorithmSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    method, place = method_class(algorithm.name), ("algorithm", section_key(algorithm))
    dotted, given = ".".join(place), given_settings(algorithm)
    if algorithm.preset is not None and algorithm.preset not in method.presets:
        presets = ", ".join(method.presets) or "none"
        yield (
            ("algorithm", "preset"),
            f"algorithm.preset: {algorithm.preset!r} given; presets of {algorithm.name}: {presets}",
        )
    if place[1] != "settings" and algorithm.settings is not None:
        yield (
            ("algorithm", "settings"),
            "algorithm.settings: read only with algorithm.name: package.module:Class; the settings of "
            f"{algorithm.name} are in {dotted}",
        )
    for name, other in method.Settings.replaced(_plain(method, given)).items():
        if name in given:
            yield (*place, name), f"{dotted}.{name} is replaced by {dotted}.{other}; give only one of them"
    known = [setting.name for setting in settings_of(method.Settings) if setting.name not in BESIDE]
    wrong = [name for name in given if name not in known]
    for name in wrong:
        yield (*place, name), f"unknown key {dotted}.{name}: {unknown(f'setting of {algorithm.name}', name, known)}"
    values = effective_values(method, algorithm.preset, given)
    missing = [name for name in known if name not in values and name not in method.Settings.replaced(given)]
    for name in missing:
        yield (*place, name), f"{dotted}.{name} is missing"
    if wrong or missing:
        return
    try:
        _made(algorithm)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        yield ((*place, name), f"{dotted}.{error}") if name in known else (place, f"{dotted}: {error}")
