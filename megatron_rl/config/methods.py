"""The settings of the configured method, and what the method needs.

Settings that are not given have the value of `algorithm.preset`, otherwise the method's default. A user's own method is
named by its import path and takes its settings from `algorithm.settings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from lpreg import LossInputs, LossOutput, MethodNeeds, MethodSettings, PolicyLoss
from lpreg.losses.corrected import CorrectionSettings
from lpreg.losses.lp_reg_term import LpRegTermSettings
from lpreg.losses.reference_kl import ReferenceKLSettings
from lpreg.losses.registry import METHODS, unknown
from lpreg.losses.settings import settings_of
from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import call_own, import_object, is_import_path

from .algorithm import AlgorithmSettings
from .method_sections import BESIDE, MethodSection, effective_values, plain_values, term_settings


def method_class(name: str) -> type[PolicyLoss]:
    """Returns the class of a method of lpreg, or of a user's own from its import path. An exception that a user's own
    method raises becomes a UserError that names the key.

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
    return _naming_errors(method, name)


@cache
def _naming_errors(method: type[PolicyLoss], name: str) -> type[PolicyLoss]:
    """Returns a subclass whose calls raise errors that name the key."""

    def call(self: PolicyLoss, inputs: LossInputs) -> LossOutput:
        output: LossOutput = call_own(name, "algorithm.name", method.__call__, self, inputs)
        return output

    return type(method.__name__, (method,), {"__call__": call, "__module__": method.__module__})


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
    """Returns what the configured method needs, Lp-Reg's term, reference model and correction included.

    Needs no torch, except that a user's own method is imported. Raises UserError as `method_settings` does.
    """
    needs = method_settings(algorithm).needs
    if (term := lp_reg_term(algorithm)) is not None:
        needs = term.around(needs)
    if algorithm.reference_kl.active:
        needs = ReferenceKLSettings(**algorithm.reference_kl.model_dump(exclude={"model"})).around(needs)
    if algorithm.correction.active:
        needs = CorrectionSettings(**algorithm.correction.model_dump()).around(needs)
    return needs


def lp_reg_term(algorithm: AlgorithmSettings) -> LpRegTermSettings | None:
    """Returns the settings of Lp-Reg's term on the configured method; None: the configuration has no such term."""
    section = getattr(algorithm, "with_lp_reg", None)
    return None if section is None else term_settings(section, proxy_source=algorithm.proxy_source)


def _made(algorithm: AlgorithmSettings) -> MethodSettings:
    """Raises ValueError for settings that do not go together."""
    method = method_class(algorithm.name)
    values = effective_values(method, algorithm.preset, given_settings(algorithm))
    known = {setting.name for setting in settings_of(method.Settings)}
    beside = {name: getattr(algorithm, name) for name in BESIDE if name in known}
    settings: MethodSettings = method.Settings(**plain_values(method, values), **beside)
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
    yield from _replaced(place, given, method.Settings.replaced(plain_values(method, given)))
    if (section := getattr(algorithm, "with_lp_reg", None)) is not None:
        yield from _replaced(("algorithm", "with_lp_reg"), section.model_fields_set, section.replaced)
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
        made = _made(algorithm)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        yield ((*place, name), f"{dotted}.{error}") if name in known else (place, f"{dotted}: {error}")
        return
    try:
        if (term := lp_reg_term(algorithm)) is not None:
            term.around(made.needs)
    except ValueError as error:
        yield ("algorithm", "with_lp_reg"), f"algorithm.with_lp_reg: {error}"


def _replaced(
    place: tuple[str, ...], given: Collection[str], replaced: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    dotted = ".".join(place)
    for name, other in replaced.items():
        if name in given:
            yield (*place, name), f"{dotted}.{name} is replaced by {dotted}.{other}; give only one of them"
