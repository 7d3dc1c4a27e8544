"""Methods by name, found by file: `lpreg/losses/<name>.py` is the method that states this name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from lpreg.losses.base import PolicyLoss, WrappedLoss
from lpreg.losses.settings import settings_of


def _found() -> dict[str, type[PolicyLoss]]:
    package = __name__.rpartition(".")[0]
    methods: dict[str, type[PolicyLoss]] = {}
    for _, file, _ in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if f"{package}.{file}" == __name__:
            continue
        for member in vars(importlib.import_module(f"{package}.{file}")).values():
            is_method = isinstance(member, type) and issubclass(member, PolicyLoss)
            if is_method and not issubclass(member, WrappedLoss) and getattr(member, "name", None) == file:
                methods[file] = member
    return methods


METHODS = _found()


class _LossFactory:
    """`make_loss(name, **settings)` and `make_loss.preset(name, preset, **overrides)`."""

    def __call__(self, name: str, **settings: Any) -> PolicyLoss:
        """Returns the method `name`; settings that are not given have the defaults of its Settings dataclass.

        Raises:
            ValueError: an unknown method or setting (the message names the nearest known one), or a value out of range.
        """
        if name not in METHODS:
            raise ValueError(unknown("method", name, METHODS))
        method = METHODS[name]
        known = [setting.name for setting in settings_of(method.Settings)]
        for setting in settings:
            if setting not in known:
                raise ValueError(unknown(f"setting of {name}", setting, known))
        return method(method.Settings(**settings))

    def preset(self, name: str, preset: str, **overrides: Any) -> PolicyLoss:
        """Returns the method `name` with the settings of one of its presets, "paper" (arXiv 2510.03222) or "reference"
        (as its published scripts run it), some of them overridden.

        Raises:
            ValueError: an unknown method, preset or setting, or a value out of range.
        """
        if name not in METHODS:
            raise ValueError(unknown("method", name, METHODS))
        presets = METHODS[name].presets
        if preset not in presets:
            raise ValueError(unknown(f"preset of {name}", preset, presets))
        return self(name, **presets[preset] | overrides)


make_loss = _LossFactory()


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """A message about an unknown name, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{given!r} is not a {what}; {hint}known: {', '.join(known)}"
